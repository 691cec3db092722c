#pragma once

#include "ops/config.h"
#include "ops/group.h"
#include "ops/state.h"

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

// The layer in at:: operations: what every device without kernels of its own runs, and what is differentiated where a
// gradient of a gradient, a forward-mode tangent or torch.func is asked for.

namespace momentum_bn::composite {

/// float64 for float64 input, else float32: the dtype in which values are normalised.
at::ScalarType accumulate_type(at::ScalarType dtype);

/// The dtype of statistics that are merged and blended: float64 where the device has it.
at::ScalarType blend_type(const at::Tensor& x);

/// What a rank tells the others of its batch, which may be empty: see `_batch_statistics` in schemas.cpp. Detached.
at::Tensor packed_statistics(const at::Tensor& x);

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
/// In a group, a rank with two values per channel or more does not wait for the device; one with fewer must know
/// whether the others have any.
std::tuple<at::Tensor, at::Tensor> train_forward(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                                                 const std::optional<at::Tensor>& weight,
                                                 const std::optional<at::Tensor>& bias, State state,
                                                 const Config& config, const Group& group);

/// The same as a pure function: y, batch mean, unbiased batch variance and `saved`.
/// @param running_mean  absent: the batch alone
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> functional_forward(
    const at::Tensor& x, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& running_mean, const std::optional<at::Tensor>& running_var, double momentum,
    double eps, Variance variance);

/// cur_iter += 1 and the momentum that belongs to it, wherever `where` (0-d bool, or undefined: everywhere).
void advance_schedule(at::Tensor& cur_iter, at::Tensor& momentum, int64_t total_iters, Schedule schedule,
                      const at::Tensor& where);

/// 1 - the teacher's param momentum, 0-d on the device of `updates`: at most 1 - param_momentum.
at::Tensor weight_of_student(const at::Tensor& updates, int64_t total_iters, double param_momentum);

/// Each parameter of the teacher, or its master where it has one, moves to the student's by weight_of_student.
void teacher_update(at::TensorList teacher, at::TensorList master, at::TensorList student, at::Tensor& updates,
                    int64_t total_iters, double param_momentum);

}  // namespace momentum_bn::composite
