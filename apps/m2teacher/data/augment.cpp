#include "data/augment.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/affine_grid_generator.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/grid_sampler_2d.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

namespace m2teacher {
namespace {

constexpr int64_t kBilinear = 0;
constexpr int64_t kZeroPadding = 0;
constexpr int64_t kChunkImages = 2000;

at::Tensor uniform(at::IntArrayRef shape, double low, double high, at::Generator& generator) {
  return at::rand(shape, generator, at::kFloat).mul_(high - low).add_(low);
}

/// -1 for a `share` of the entries, else 1.
at::Tensor random_sign(int64_t count, double share, at::Generator& generator) {
  return uniform({count}, 0, 1, generator).lt(share).to(at::kFloat).mul_(-2).add_(1);
}

at::Tensor resample(const at::Tensor& images, const at::Tensor& affine) {
  const at::Tensor grid = at::affine_grid_generator(affine, images.sizes(), /*align_corners=*/false);
  return at::grid_sampler_2d(images, grid, kBilinear, kZeroPadding, /*align_corners=*/false);
}

}  // namespace

AugmentDraw draw_augmentations(int64_t count, const AugmentOptions& options, at::Generator& generator) {
  const at::Tensor area = uniform({count}, options.min_area, options.max_area, generator);
  const at::Tensor aspect = uniform({count}, -std::log(options.max_aspect), std::log(options.max_aspect), generator).exp_();
  const at::Tensor width = (area * aspect).sqrt_().clamp_max_(1);
  const at::Tensor height = (area / aspect).sqrt_().clamp_max_(1);

  at::Tensor affine = at::zeros({count, 2, 3});
  affine.select(1, 0).select(1, 0).copy_(width * random_sign(count, options.flip, generator));
  affine.select(1, 1).select(1, 1).copy_(height);
  // The crop stays inside the image, which spans [-1, 1].
  affine.select(1, 0).select(1, 2).copy_((1 - width).mul_(uniform({count}, -1, 1, generator)));
  affine.select(1, 1).select(1, 2).copy_((1 - height).mul_(uniform({count}, -1, 1, generator)));

  const std::initializer_list<int64_t> per_image = {count, 1, 1, 1};
  AugmentDraw draw;
  draw.affine = std::move(affine);
  draw.gamma = uniform(per_image, -options.gamma, options.gamma, generator).exp_();
  draw.contrast = uniform(per_image, 1 - options.contrast, 1 + options.contrast, generator);
  draw.brightness = uniform(per_image, 1 - options.brightness, 1 + options.brightness, generator);
  return draw;
}

at::Tensor apply_augmentations(const at::Tensor& images, const AugmentDraw& draw) {
  // Bilinear weights may sum to a little more than 1 and to less than 0, of which pow would make NaN.
  at::Tensor out = resample(images, draw.affine).clamp_(0, 1).pow_(draw.gamma);
  out.mul_(draw.brightness);
  const at::Tensor mean = out.mean({1, 2, 3}, /*keepdim=*/true);
  return out.mul_(draw.contrast).add_(mean.mul_(1 - draw.contrast));
}

at::Tensor to_unit_range(const at::Tensor& images) { return images.to(at::kFloat).mul_(1.0 / 255); }

at::Tensor shift_and_flip(const at::Tensor& images, double shift, uint64_t seed) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  at::Tensor out = at::empty_like(images);
  for (int64_t begin = 0; begin < images.size(0); begin += kChunkImages) {
    const int64_t count = std::min(kChunkImages, images.size(0) - begin);
    at::Tensor affine = at::zeros({count, 2, 3});
    affine.select(1, 0).select(1, 0).copy_(random_sign(count, 0.5, generator));
    affine.select(1, 1).select(1, 1).fill_(1);
    affine.select(2, 2).copy_(uniform({count, 2}, -shift, shift, generator));
    const at::Tensor moved = resample(images.narrow(0, begin, count).to(at::kFloat), affine);
    out.narrow(0, begin, count).copy_(moved.round_().clamp_(0, 255));
  }
  return out;
}

}  // namespace m2teacher
