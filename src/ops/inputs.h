#pragma once

#include "ops/ops.h"
#include "ops/state.h"

#include <ATen/core/Tensor.h>

#include <array>

// The checks of each operator's inputs as a whole, shared by its implementations.

namespace momentum_bn {

/// @param has_others  other processes' values are counted, too: this one may have one per channel, or none
/// @return false where x is empty and all there is: nothing to compute and nothing to count
bool check_forward_train(const at::Tensor& x, const ops::MaybeTensor& residual, const ops::MaybeTensor& weight,
                         const ops::MaybeTensor& bias, const State& state, bool has_others);

bool check_forward_functional(const at::Tensor& x, const ops::MaybeTensor& weight, const ops::MaybeTensor& bias,
                              const ops::MaybeTensor& running_mean, const ops::MaybeTensor& running_var,
                              double momentum, double eps);

/// x is a floating-point tensor, and what is defined of the others fits it.
void check_parameters(const at::Tensor& x, const ops::MaybeTensor& weight, const ops::MaybeTensor& bias,
                      const ops::MaybeTensor& running_mean, const ops::MaybeTensor& running_var);

void check_forward_eval(const at::Tensor& x, const ops::MaybeTensor& residual, const ops::MaybeTensor& weight,
                        const ops::MaybeTensor& bias, const at::Tensor& running_mean, const at::Tensor& running_var);

/// What the backward pass needs for the gradients that output_mask (dx, dweight, dbias, dresidual) asks for is there and
/// fits dy: a saved-tensor hook may have given back anything.
void check_backward(const at::Tensor& dy, const ops::MaybeTensor& x, const ops::MaybeTensor& y,
                    const ops::MaybeTensor& weight, const at::Tensor& saved, bool relu,
                    const std::array<bool, 4>& output_mask);

/// No two elements of x share memory.
void check_writable(const at::Tensor& x);

/// Like x, in its suggested memory format.
at::Tensor empty_output(const at::Tensor& x);

/// `saved` (see schemas.cpp) where x is empty: there are no statistics.
at::Tensor zero_saved(const at::Tensor& x);

}  // namespace momentum_bn
