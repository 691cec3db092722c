#include "data/crop.h"

#include <ATen/ops/_upsample_bilinear2d_aa.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace m2teacher {
namespace {

constexpr int kTries = 10;

/// Part of an image in pixels.
struct PixelBox {
  int64_t left;
  int64_t top;
  int64_t width;
  int64_t height;
};

PixelBox in_pixels(const CropBox& box, int64_t height, int64_t width) {
  const auto length = [](double share, int64_t side) {
    return std::clamp<int64_t>(std::llround(share * static_cast<double>(side)), 1, side);
  };
  const auto start = [](double share, int64_t side, int64_t taken) {
    return std::clamp<int64_t>(std::llround(share * static_cast<double>(side)), 0, side - taken);
  };
  PixelBox pixels{};
  pixels.width = length(box.width, width);
  pixels.height = length(box.height, height);
  pixels.left = start(box.left, width, pixels.width);
  pixels.top = start(box.top, height, pixels.height);
  return pixels;
}

}  // namespace

CropBox random_crop(const AugmentOptions& options, int64_t height, int64_t width, Random random) {
  const double shape = static_cast<double>(width) / static_cast<double>(height);
  const double reach = std::log(options.max_aspect);
  for (int attempt = 0; attempt < kTries; ++attempt) {
    const double area = random.uniform(options.min_area, options.max_area);
    const double aspect = std::exp(random.uniform(-reach, reach));
    CropBox box;
    box.width = std::sqrt(area * aspect / shape);
    box.height = std::sqrt(area / aspect * shape);
    if (box.width <= 1 && box.height <= 1) {
      box.left = random.uniform() * (1 - box.width);
      box.top = random.uniform() * (1 - box.height);
      return box;
    }
  }
  CropBox box;
  box.width = std::min(1.0, options.max_aspect / shape);
  box.height = std::min(1.0, options.max_aspect * shape);
  box.left = (1 - box.width) / 2;
  box.top = (1 - box.height) / 2;
  return box;
}

void scale_part(const at::Tensor& image, const CropBox& box, int64_t height, int64_t width, uint8_t* into) {
  const PixelBox from = in_pixels(box, image.size(0), image.size(1));
  // (1, C, h, w) in channels last, for which ATen has a fast kernel of 8-bit numbers.
  const at::Tensor part = image.narrow(0, from.top, from.height)
                              .narrow(1, from.left, from.width)
                              .contiguous()
                              .permute({2, 0, 1})
                              .unsqueeze(0);
  const at::Tensor scaled = at::_upsample_bilinear2d_aa(part, {height, width}, /*align_corners=*/false)
                                .contiguous(at::MemoryFormat::ChannelsLast);
  std::memcpy(into, scaled.const_data_ptr<uint8_t>(), scaled.nbytes());
}

}  // namespace m2teacher
