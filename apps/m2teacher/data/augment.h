#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

namespace m2teacher {

/// Ranges from which the augmentations are drawn, uniformly and for each image by itself.
struct AugmentOptions {
  double min_area = 0.45;  ///< area of the crop, as a share of the image's, in [min_area, max_area]
  double max_area = 1.0;
  double log_aspect = 0.25;  ///< width / height of the crop in e^[-log_aspect, log_aspect]
  double flip_share = 0.5;   ///< share of images mirrored left to right
  double log_gamma = 0.5;    ///< exponent of the pixel values in e^[-log_gamma, log_gamma]
  double contrast = 0.4;     ///< factor about the image's mean in 1 +- contrast
  double brightness = 0.2;   ///< added to the pixel values, in +-brightness
};

/// What was drawn for N images.
struct AugmentDraw {
  at::Tensor affine;      ///< (N, 2, 3): where each output pixel comes from, as `at::affine_grid_generator` takes it
  at::Tensor gamma;       ///< (N, 1, 1, 1)
  at::Tensor contrast;    ///< (N, 1, 1, 1)
  at::Tensor brightness;  ///< (N, 1, 1, 1)
};

AugmentDraw draw_augmentations(int64_t count, const AugmentOptions& options, at::Generator& generator);

/// Random resized crop and flip (bilinear, to the image's own size), then gamma, contrast and brightness.
/// Contrast keeps the mean of each image's own pixels. The result is not clamped.
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
