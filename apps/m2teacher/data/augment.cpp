#include "data/augment.h"

#include "device/upload.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/affine_grid_generator.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/grid_sampler_2d.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>

namespace m2teacher {
namespace {

constexpr int64_t kBilinear = 0;
constexpr int64_t kZeroPadding = 0;
constexpr int64_t kChunkImages = 2000;
constexpr double kBlurSide = 224;  // the image that sigmas are given for
constexpr double kBlurReach = 3;   // largest standard deviations that a blur looks to either side
constexpr double kSmallestSigma = 1e-3;
constexpr double kSolarised = 0.5;  // values from here on are inverted
// Luma of ITU-R BT.601, as PIL and torchvision have it.
constexpr std::array<double, 3> kLuma = {0.299, 0.587, 0.114};
constexpr int64_t kColours = 3;
constexpr double kHueSectors = 6;

at::Tensor resample(const at::Tensor& images, const at::Tensor& affine) {
  const at::Tensor grid = at::affine_grid_generator(affine, images.sizes(), /*align_corners=*/false);
  return at::grid_sampler_2d(images, grid, kBilinear, kZeroPadding, /*align_corners=*/false);
}

/// One value for each of the images, to be broadcast over (N, C, H, W).
at::Tensor per_image(const at::Tensor& values, const at::Tensor& images) {
  return on_device(values, images.device()).view({-1, 1, 1, 1});
}

/// Crops, scales to the images' own size, and mirrors.
at::Tensor crop_and_flip(const at::Tensor& images, const ViewDraw& draw) {
  const auto count = static_cast<int64_t>(draw.boxes.size());
  const at::Tensor affine = at::zeros({count, 2, 3});
  auto to = affine.accessor<float, 3>();
  const auto flip = draw.flip.accessor<bool, 1>();
  for (int64_t n = 0; n < count; ++n) {
    // The image spans [-1, 1].
    const CropBox& box = draw.boxes[n];
    to[n][0][0] = static_cast<float>(flip[n] ? -box.width : box.width);
    to[n][1][1] = static_cast<float>(box.height);
    to[n][0][2] = static_cast<float>(2 * box.left + box.width - 1);
    to[n][1][2] = static_cast<float>(2 * box.top + box.height - 1);
  }
  return resample(images, on_device(affine, images.device()));
}

/// Replaces the images of the mask by what `change` makes of them; `change` gets them and their indices. What is drawn
/// lies on the CPU, so that a device need not be waited for; of it and of the indices the images' device gets copies.
template <typename Change>
void change_some(at::Tensor& images, const at::Tensor& mask, const Change& change) {
  const at::Tensor index = mask.nonzero().flatten();
  if (index.numel() == images.size(0)) {
    images = change(images, index);
  } else if (index.numel() > 0) {
    const at::Tensor there = on_device(index, images.device());
    images.index_copy_(0, there, change(images.index_select(0, there), index));
  }
}

/// (N, 1, H, W)
at::Tensor grey(const at::Tensor& images) {
  if (images.size(1) != kColours) {
    return images;
  }
  return images.narrow(1, 0, 1) * kLuma[0] + images.narrow(1, 1, 1) * kLuma[1] + images.narrow(1, 2, 1) * kLuma[2];
}

/// base + (images - base) * factor, clamped.
at::Tensor blend(const at::Tensor& images, const at::Tensor& base, const at::Tensor& factor) {
  return images.mul(factor).add_(base.mul(1 - factor)).clamp_(0, 1);
}

/// Moves hues by `turns`, through HSV: a colour is its largest value less what its hue takes from each channel.
at::Tensor move_hue(const at::Tensor& images, const at::Tensor& turns) {
  const at::Tensor red = images.select(1, 0);
  const at::Tensor green = images.select(1, 1);
  const at::Tensor blue = images.select(1, 2);
  const at::Tensor value = images.amax({1});
  const at::Tensor chroma = value - images.amin({1});
  const at::Tensor divisor = at::where(chroma.gt(0), chroma, 1);
  at::Tensor sector = at::where(value.eq(red), (green - blue) / divisor,
                                at::where(value.eq(green), (blue - red) / divisor + kHueSectors / 3,
                                          (red - green) / divisor + 2 * kHueSectors / 3));
  sector = sector + turns.view({-1, 1, 1}) * kHueSectors;
  at::Tensor out = at::empty_like(images);
  for (int64_t channel = 0; channel < kColours; ++channel) {
    // Red stands at sector 0, green at 2, blue at 4: less than one sector away all of it is there, beyond two nothing.
    const at::Tensor place = (sector - static_cast<double>(2 * channel)).remainder_(kHueSectors);
    const at::Tensor distance = at::minimum(place, kHueSectors - place);
    out.select(1, channel).copy_(value - chroma * (distance - 1).clamp_(0, 1));
  }
  return out.clamp_(0, 1);
}

at::Tensor colour_operation(ColourOperation operation, const at::Tensor& images, const at::Tensor& factor) {
  switch (operation) {
    case ColourOperation::Brightness:
      return images.mul(factor).clamp_(0, 1);
    case ColourOperation::Contrast:
      return blend(images, grey(images).mean({1, 2, 3}, /*keepdim=*/true), factor);
    case ColourOperation::Saturation:
      return blend(images, grey(images), factor);
    case ColourOperation::Hue:
      break;
  }
  return move_hue(images, factor);
}

void jitter_colours(at::Tensor& images, const ViewDraw& draw) {
  const bool coloured = images.size(1) == kColours;
  for (int64_t turn = 0; turn < kColourOperations; ++turn) {
    for (int64_t k = 0; k < kColourOperations; ++k) {
      const auto operation = static_cast<ColourOperation>(k);
      if (!coloured && (operation == ColourOperation::Saturation || operation == ColourOperation::Hue)) {
        continue;
      }
      change_some(images, draw.order.select(1, turn).eq(k).logical_and_(draw.jitter),
                  [&](const at::Tensor& some, const at::Tensor& index) {
                    return colour_operation(operation, some,
                                            per_image(draw.factors.select(1, k).index_select(0, index), some));
                  });
    }
  }
}

/// Gaussian blur with a standard deviation for each image; what lies outside is mirrored in.
at::Tensor gaussian_blur(const at::Tensor& images, const at::Tensor& sigma, int64_t wanted_reach) {
  const int64_t height = images.size(2);
  const int64_t width = images.size(3);
  const int64_t reach = std::min({wanted_reach, height - 1, width - 1});
  if (reach < 1) {
    return images;
  }
  const at::Tensor offset = at::arange(-reach, reach + 1, images.options().dtype(at::kFloat));
  at::Tensor weight =
      (offset / on_device(sigma, images.device()).unsqueeze(1)).square_().mul_(-0.5).exp_();  // (N, taps)
  weight = weight / weight.sum(1, /*keepdim=*/true);
  // Each channel of each image is a channel of one large image, with a filter of its own.
  const int64_t planes = images.size(0) * images.size(1);
  weight = weight.repeat_interleave(images.size(1), 0);
  at::Tensor out = images.contiguous().view({planes, height, width});
  out = at::reflection_pad2d(out, {reach, reach, reach, reach}).unsqueeze(0);
  out = at::conv2d(out, weight.view({planes, 1, -1, 1}), {}, {1}, at::IntArrayRef{0}, {1}, planes);
  out = at::conv2d(out, weight.view({planes, 1, 1, -1}), {}, {1}, at::IntArrayRef{0}, {1}, planes);
  return out.view(images.sizes());
}

/// For each image, from a permutation drawn by swaps.
void draw_order(Random& random, int64_t* order) {
  std::iota(order, order + kColourOperations, 0);
  for (int64_t last = kColourOperations - 1; last > 0; --last) {
    std::swap(order[last], order[random.below(last + 1)]);
  }
}

}  // namespace

ViewDraw draw_view(const AugmentOptions& options, const ViewPlace& at, int64_t count, const ImageShape& shape,
                   bool crop) {
  ViewDraw draw{.boxes = {},
                .flip = at::empty({count}, at::kBool),
                .gamma = at::empty({count}),
                .jitter = at::empty({count}, at::kBool),
                .factors = at::empty({count, kColourOperations}),
                .order = at::empty({count, kColourOperations}, at::kLong),
                .greyscale = at::empty({count}, at::kBool),
                .blur = at::empty({count}, at::kBool),
                .sigma = at::empty({count}),
                .blur_reach = 0,
                .solarise = at::empty({count}, at::kBool)};
  const ViewAugmentOptions& view = options.views.at(static_cast<size_t>(at.view));
  const double sigma_scale = static_cast<double>(std::min(shape.height, shape.width)) / kBlurSide;
  draw.blur_reach = static_cast<int64_t>(std::ceil(kBlurReach * sigma_scale * options.max_blur_sigma));
  for (int64_t n = 0; n < count; ++n) {
    ViewPlace place = at;
    place.place += n;
    if (crop) {
      draw.boxes.push_back(random_crop(options, shape.height, shape.width, Random(Purpose::Crop, place)));
    }
    Random random(Purpose::Colour, place);
    draw.flip.mutable_data_ptr<bool>()[n] = random.chance(options.flip);
    draw.gamma.mutable_data_ptr<float>()[n] =
        static_cast<float>(std::exp(random.uniform(-options.gamma, options.gamma)));
    draw.jitter.mutable_data_ptr<bool>()[n] = random.chance(options.jitter);
    const std::array<std::pair<double, double>, kColourOperations> ranges = {
        {{1, options.brightness}, {1, options.contrast}, {1, options.saturation}, {0, options.hue}}};
    float* factors = draw.factors.mutable_data_ptr<float>() + n * kColourOperations;
    for (const auto& [middle, reach] : ranges) {
      *factors++ = static_cast<float>(random.uniform(middle - reach, middle + reach));
    }
    draw_order(random, draw.order.mutable_data_ptr<int64_t>() + n * kColourOperations);
    draw.greyscale.mutable_data_ptr<bool>()[n] = random.chance(options.greyscale);
    draw.blur.mutable_data_ptr<bool>()[n] = random.chance(view.blur);
    draw.sigma.mutable_data_ptr<float>()[n] = static_cast<float>(
        std::max(kSmallestSigma, sigma_scale * random.uniform(options.min_blur_sigma, options.max_blur_sigma)));
    draw.solarise.mutable_data_ptr<bool>()[n] = random.chance(view.solarise);
  }
  return draw;
}

at::Tensor augment(const at::Tensor& images, const ViewDraw& draw) {
  at::Tensor out = to_unit_range(images);
  if (!draw.boxes.empty()) {
    // Bilinear weights may sum to a little more than 1.
    out = crop_and_flip(out, draw).clamp_(0, 1);
  } else {
    change_some(out, draw.flip, [](const at::Tensor& some, const at::Tensor&) { return some.flip({3}); });
  }
  if (draw.gamma.ne(1).any().item<bool>()) {
    out.pow_(per_image(draw.gamma, out));
  }
  jitter_colours(out, draw);
  if (images.size(1) == kColours) {
    change_some(out, draw.greyscale,
                [](const at::Tensor& some, const at::Tensor&) { return grey(some).expand_as(some).contiguous(); });
  }
  change_some(out, draw.blur, [&](const at::Tensor& some, const at::Tensor& index) {
    return gaussian_blur(some, draw.sigma.index_select(0, index), draw.blur_reach);
  });
  change_some(out, draw.solarise,
              [](const at::Tensor& some, const at::Tensor&) { return at::where(some.ge(kSolarised), 1 - some, some); });
  return out;
}

at::Tensor to_unit_range(const at::Tensor& images) { return images.to(at::kFloat).mul_(1.0 / 255); }

at::Tensor shift_and_flip(const at::Tensor& images, double shift, uint64_t seed) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  const auto uniform = [&](at::IntArrayRef shape, double low, double high) {
    return at::rand(shape, generator, at::kFloat).mul_(high - low).add_(low);
  };
  at::Tensor out = at::empty_like(images);
  for (int64_t begin = 0; begin < images.size(0); begin += kChunkImages) {
    const int64_t count = std::min(kChunkImages, images.size(0) - begin);
    at::Tensor affine = at::zeros({count, 2, 3});
    affine.select(1, 0).select(1, 0).copy_(uniform({count}, 0, 1).lt(0.5).to(at::kFloat).mul_(-2).add_(1));
    affine.select(1, 1).select(1, 1).fill_(1);
    affine.select(2, 2).copy_(uniform({count, 2}, -shift, shift));
    const at::Tensor moved = resample(images.narrow(0, begin, count).to(at::kFloat), affine);
    out.narrow(0, begin, count).copy_(moved.round_().clamp_(0, 255));
  }
  return out;
}

}  // namespace m2teacher
