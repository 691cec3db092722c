#pragma once

#include "ops/config.h"
#include "ops/state.h"

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

// The layer in at:: operations: what every device without kernels of its own runs, and what is differentiated where a
// gradient of a gradient, a forward-mode tangent or torch.func is asked for.

namespace momentum_bn::composite {

/// Batch mean (in two parts: the value and what it lost to rounding) and unbiased batch variance, (C) each, detached.
struct BatchStatistics {
  at::Tensor mean;
  at::Tensor mean_rest;
  at::Tensor var;
};

/// float64 for float64 input, else float32: the dtype in which values are normalised.
at::ScalarType accumulate_type(at::ScalarType dtype);

/// Number of values per channel.
double values_per_channel(const at::Tensor& x);

BatchStatistics batch_statistics(const at::Tensor& x);

/// Rows mean, rest of the mean, 1 / std (see schemas.cpp) of [m * batch + (1 - m) * running], in x's accumulate type.
/// @param momentum  0-d, or undefined: the batch alone
at::Tensor blend(const at::Tensor& x, const BatchStatistics& batch, const at::Tensor& running_mean,
                 const at::Tensor& running_var, const at::Tensor& momentum, double eps, Variance variance);

/// activation(torch's BatchNorm with the running statistics + residual). An empty input gives an empty output.
at::Tensor evaluate(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                    const at::Tensor& running_mean, const at::Tensor& running_var, double eps, Activation activation);

/// y = activation((x - mean) / std * weight + bias + residual), differentiable in all but `saved`.
at::Tensor normalize(const at::Tensor& x, const at::Tensor& saved, const std::optional<at::Tensor>& weight,
                     const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                     Activation activation);

/// dx, dweight, dbias, dresidual; differentiable in dy, x and weight. Undefined where output_mask is false.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> normalize_backward(
    const at::Tensor& dy, const std::optional<at::Tensor>& x, const std::optional<at::Tensor>& y,
    const std::optional<at::Tensor>& weight, const at::Tensor& saved, Activation activation,
    std::array<bool, 4> output_mask);

/// A layer's training forward: `y` and `saved`. The state takes the batch in; no gradient flows through statistics.
std::tuple<at::Tensor, at::Tensor> train_forward(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                                                 const std::optional<at::Tensor>& weight,
                                                 const std::optional<at::Tensor>& bias, State state,
                                                 const Config& config);

/// The same as a pure function: y, batch mean, unbiased batch variance and `saved`.
/// @param running_mean  absent: the batch alone
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> functional_forward(
    const at::Tensor& x, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& running_mean, const std::optional<at::Tensor>& running_var, double momentum,
    double eps, Variance variance);

/// The weight of the batch now: a 0-d tensor on the state's device; undefined where the layer does not track.
at::Tensor current_momentum(const State& state);

/// Takes the batch into the state, without waiting for the device.
void update_state(State& state, const BatchStatistics& batch, double n, const Config& config);

/// cur_iter += 1 and the momentum that belongs to it, wherever `where` (0-d bool, or undefined: everywhere).
void advance_schedule(at::Tensor& cur_iter, at::Tensor& momentum, int64_t total_iters, Schedule schedule,
                      const at::Tensor& where);

}  // namespace momentum_bn::composite
