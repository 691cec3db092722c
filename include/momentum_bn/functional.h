#pragma once

#include <momentum_bn/options.h>

#include <ATen/core/Tensor.h>

#include <tuple>

namespace momentum_bn::functional {

/// Momentum BatchNorm as a pure function: changes nothing that it is given.
///
/// In training, with b_mean and b_var the batch mean and unbiased batch variance per channel,
///
///     y = (x - [m * b_mean + (1 - m) * running_mean]) / sqrt([m * v + (1 - m) * running_var] + eps) * weight + bias
///
/// where v is b_var adjusted as `variance` says (arXiv 2101.07525). The statistics are detached: no gradient flows
/// through them. In evaluation it is `at::batch_norm` with the running statistics.
///
/// @param x             (N, C) or (N, C, ...), float32, float64, bfloat16 or float16
/// @param running_mean  (C) or undefined: the batch alone (m = 1)
/// @param running_var   (C) or undefined; both or neither
/// @param weight, bias  (C) or undefined
/// @param momentum      weight m of the batch, in [0, 1]
/// @return y (like x), b_mean, b_var: (C), detached, float32 for 16-bit input, else x's dtype; empty unless training
/// @throws c10::ValueError  on wrong shapes, options out of range, one value per channel
/// @throws c10::TypeError   on integer or complex input
MOMENTUM_BN_API std::tuple<at::Tensor, at::Tensor, at::Tensor> momentum_batch_norm(
    const at::Tensor& x, const at::Tensor& running_mean, const at::Tensor& running_var, const at::Tensor& weight = {},
    const at::Tensor& bias = {}, bool training = false, double momentum = 1.0, double eps = 1e-5,
    Variance variance = Variance::Published);

}  // namespace momentum_bn::functional
