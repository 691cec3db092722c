#include "data/image_source.h"

#include "device/upload.h"

#include "error.h"

#include <ATen/ops/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace m2teacher {
namespace {

constexpr int64_t kPixelValues = 256;

/// A value for each channel of the pixels, to be broadcast over (N, C, H, W).
at::Tensor per_channel(const std::vector<double>& values, const at::Tensor& pixels) {
  return on_device(at::tensor(values, at::kFloat), pixels.device()).view({1, -1, 1, 1});
}

}  // namespace

PixelStatistics pixel_statistics(const at::Tensor& images) {
  PixelStatistics statistics;
  for (int64_t c = 0; c < images.size(1); ++c) {
    const at::Tensor channel = images.select(1, c).contiguous();
    std::array<int64_t, kPixelValues> counts{};
    const uint8_t* values = channel.const_data_ptr<uint8_t>();
    for (int64_t i = 0; i < channel.numel(); ++i) {
      ++counts[values[i]];
    }
    double sum = 0;
    double square_sum = 0;
    for (int64_t value = 0; value < kPixelValues; ++value) {
      const double pixel = static_cast<double>(value) / (kPixelValues - 1);
      sum += pixel * static_cast<double>(counts[value]);
      square_sum += pixel * pixel * static_cast<double>(counts[value]);
    }
    const auto n = static_cast<double>(channel.numel());
    const double mean = sum / n;
    statistics.mean.push_back(mean);
    // Images of one colour are not divided by zero.
    statistics.std.push_back(std::max(std::sqrt(std::max(square_sum / n - mean * mean, 0.0)), 1.0 / kPixelValues));
  }
  return statistics;
}

at::Tensor standardise_(const at::Tensor& pixels, const PixelStatistics& statistics) {
  if (statistics.mean.size() == 1) {
    return pixels.sub_(statistics.mean[0]).div_(statistics.std[0]);
  }
  return pixels.sub_(per_channel(statistics.mean, pixels)).div_(per_channel(statistics.std, pixels));
}

std::vector<std::string> numbered_classes(const std::vector<at::Tensor>& labels) {
  int64_t largest = 0;
  for (const at::Tensor& tensor : labels) {
    largest = std::max(largest, tensor.max().item<int64_t>());
  }
  std::vector<std::string> names;
  for (int64_t label = 0; label <= largest; ++label) {
    names.push_back(std::to_string(label));
  }
  return names;
}

at::Tensor images_in_memory(const ImageSource& source) {
  const at::Tensor images = source.in_memory();
  if (!images.defined()) {
    throw UserError("--data: this needs images of one size in memory (idx or cifar10), not a folder");
  }
  return images;
}

TensorSource::TensorSource(at::Tensor images, at::Tensor labels)
    : images_(std::move(images)), labels_(std::move(labels)) {}

ImageShape TensorSource::shape() const {
  return {.channels = images_.size(1), .height = images_.size(2), .width = images_.size(3)};
}

bool TensorSource::read(int64_t index, const ChooseBoxes& choose, const std::vector<uint8_t*>& into) const {
  const at::Tensor image = images_[index].permute({1, 2, 0});
  const std::vector<CropBox> boxes = choose(image.size(0), image.size(1));
  for (size_t i = 0; i < boxes.size(); ++i) {
    scale_part(image, boxes[i], image.size(0), image.size(1), into[i]);
  }
  return true;
}

bool TensorSource::read_centre(int64_t index, uint8_t* into) const {
  return read(index, [](int64_t /*height*/, int64_t /*width*/) { return std::vector<CropBox>{{}}; }, {into});
}

}  // namespace m2teacher
