#pragma once

#include <ATen/core/Tensor.h>

namespace m2teacher {

/// Mean and standard deviation of the training images of Fashion-MNIST, pixels in [0, 1].
inline constexpr double kPixelMean = 0.2860;
inline constexpr double kPixelStd = 0.3530;

/// What every encoder expects: pixels less their mean, divided by their standard deviation. In place.
inline at::Tensor standardise_(const at::Tensor& pixels) { return pixels.sub_(kPixelMean).div_(kPixelStd); }

}  // namespace m2teacher
