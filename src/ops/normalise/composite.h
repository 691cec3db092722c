#pragma once

#include "ops/normalise/calls.h"
#include "ops/normalise/inputs.h"
#include "ops/normalise/options.h"
#include "ops/shared/group.h"

#include <ATen/core/Tensor.h>

#include <tuple>

// The layers in at:: operations: what every device without kernels of its own runs, and what is differentiated where a
// gradient of a gradient, a forward-mode tangent or torch.func is asked for.

namespace momentum_bn::composite {

/// What a rank tells the others of its batch, which may be empty: see `_batch_statistics` in schemas.cpp. It takes no
/// gradient.
at::Tensor packed_statistics(const at::Tensor& x);

/// activation(torch's BatchNorm with the running statistics + residual). An empty input gives an empty output.
at::Tensor evaluate(const at::Tensor& x, const ops::MaybeTensor& residual, const ops::MaybeTensor& weight,
                    const ops::MaybeTensor& bias, const at::Tensor& running_mean, const at::Tensor& running_var,
                    double eps, bool relu);

/// A layer's training forward: `y` and `saved`. The state takes the batch in; where the statistics are not detached,
/// gradients flow through them.
/// In a group, a rank with two values per channel or more does not wait for the device; one with fewer must know
/// whether the others have any.
std::tuple<at::Tensor, at::Tensor> forward_train(const ops::ForwardTrain& call);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_functional(const ops::ForwardFunctional& call);

void forward_eval_(const ops::ForwardEvalInplace& call);

/// Differentiable in dy, x and weight. Undefined where output_mask is false.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(const ops::Backward& call);

/// Adds 1 to cur_iter and sets the momentum that belongs to it, if `where` is true (a 0-d bool; undefined: always).
void advance_schedule(const at::Tensor& cur_iter, const at::Tensor& momentum, int64_t total_iters, ops::Word schedule,
                      const at::Tensor& where);

}  // namespace momentum_bn::composite
