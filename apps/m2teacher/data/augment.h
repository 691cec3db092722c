#pragma once

#include "data/augment_options.h"

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

namespace m2teacher {

/// What was drawn for N images.
struct AugmentDraw {
  at::Tensor affine;      ///< (N, 2, 3): where each output pixel comes from, as `at::affine_grid_generator` takes it
  at::Tensor gamma;       ///< (N, 1, 1, 1)
  at::Tensor contrast;    ///< (N, 1, 1, 1)
  at::Tensor brightness;  ///< (N, 1, 1, 1): factor
};

AugmentDraw draw_augmentations(int64_t count, const AugmentOptions& options, at::Generator& generator);

/// Random resized crop and flip (bilinear, to the image's own size), then gamma, brightness and contrast.
/// Contrast keeps the mean of each image's own pixels.
///
/// @param images  (N, C, H, W), float32 in [0, 1]
/// @return (N, C, H, W), float32
at::Tensor apply_augmentations(const at::Tensor& images, const AugmentDraw& draw);

/// Pixels 0..255 to float32 in [0, 1].
at::Tensor to_unit_range(const at::Tensor& images);

/// Shifts each image by up to `shift` in both directions (as a share of half the image's side; what comes into view is
/// black) and mirrors half of them.
///
/// @param images  (N, C, H, W), uint8
/// @return (N, C, H, W), uint8
at::Tensor shift_and_flip(const at::Tensor& images, double shift, uint64_t seed);

}  // namespace m2teacher
