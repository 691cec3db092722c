#pragma once

#include "kernels/shape.h"

#include <ATen/core/Tensor.h>

namespace momentum_bn {

/// Whether kernels are compiled for this dtype. torch has other floating-point ones, some of one byte a value.
bool has_kernels(at::ScalarType dtype);

/// @param dtype  one that has_kernels
kernels::Type kernel_type(at::ScalarType dtype);

/// The dtype in which values are normalised: float64 for float64 input, else float32.
at::ScalarType accumulate_type(at::ScalarType dtype);

/// The dtype of statistics that are merged and blended: float64 where x's device has it.
at::ScalarType blend_type(const at::Tensor& x);

}  // namespace momentum_bn
