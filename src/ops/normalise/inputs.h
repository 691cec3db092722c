#pragma once

#include "ops/normalise/calls.h"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

// This file has the tensors that the operators are given, and the checks of them: every tensor that a kernel is handed
// has the dtype, shape, device and layout that the kernel reads. The operators, the C++ modules and Python all call
// these checks, so that an error has the same words everywhere. A check throws unless what its comment says is so, and
// before anything was changed: c10::ValueError, c10::TypeError for a dtype, and c10::Error where torch's own BatchNorm
// raises a RuntimeError.

namespace momentum_bn {

/// The tensors of `state` (see schemas.cpp), undefined where the layer does not have them. It is a plain struct, so
/// that autograd does not take them for inputs.
struct State {
  at::Tensor running_mean;         // (C)
  at::Tensor running_var;          // (C)
  at::Tensor num_batches_tracked;  // (), int64
  // Only Momentum BatchNorm has these.
  at::Tensor view_mean_sum;  // (C)
  at::Tensor view_var_sum;   // (C)
  at::Tensor view_count;     // (), int64
  at::Tensor cur_iter;       // (), int64
  at::Tensor momentum;       // (), float64 or float32; negative: cumulative average

  /// @throws c10::ValueError for a number of tensors that is none of those in schemas.cpp
  static State of(at::TensorList tensors);

  /// Whether the layer has running statistics.
  bool tracks() const { return running_mean.defined(); }
  /// Whether this is the state of a Momentum BatchNorm.
  bool has_schedule() const { return momentum.defined(); }

  /// The same tensors without gradients, for operations that change them.
  State detached() const;
  /// Shapes, dtypes and devices fit x.
  void check(const at::Tensor& x) const;
};

/// The inputs of a training forward, whether it writes into fresh memory or over x.
struct TrainInputs {
  const at::Tensor& x;
  const ops::MaybeTensor& residual;
  const ops::MaybeTensor& weight;
  const ops::MaybeTensor& bias;
};

template <typename Train>
TrainInputs inputs_of(const Train& train) {
  return {train.x, train.residual, train.weight, train.bias};
}

// Checks of single tensors.

/// x is a dense tensor of at least two dimensions, in float32, float64, bfloat16 or float16. The residual, if any, is
/// one of x's shape and dtype on x's device.
void check_input(const at::Tensor& x, const ops::MaybeTensor& residual);
/// `tensor` is dense, has the shape and dtype of `like` and is on its device. Both names are for the message.
void check_same(const at::Tensor& tensor, const char* name, const at::Tensor& like, const char* like_name);
/// The second dimension of x is num_features.
void check_channels(const at::Tensor& x, const c10::SymInt& num_features);
/// `parameter`, if defined, is (C) on x's device, and in float32 or x's dtype.
void check_parameter(const at::Tensor& x, const at::Tensor& parameter, const char* name);
/// No two elements of `tensor` share memory.
void check_writable(const at::Tensor& tensor, const char* name);
/// A process group whose values normalise themselves has more than one per channel, or none. x is this process's batch.
void check_group_statistics(const at::Tensor& x, double values_per_channel);

// Checks of all that an operator is given.

/// @param has_others  whether other processes add their values: this one may then have one per channel, or none
/// @return false where there are no values: x is empty and there are no other processes
bool check_forward_train(const TrainInputs& inputs, const State& state, bool has_others);

/// @return false where x is empty
bool check_forward_functional(const ops::ForwardFunctional& call);

void check_forward_eval(const ops::ForwardEvalInplace& call);

/// x is as check_input asks, what is given of the others fits x, and the running statistics are both given or neither.
void check_parameters(const at::Tensor& x, const ops::MaybeTensor& weight, const ops::MaybeTensor& bias,
                      const ops::MaybeTensor& running_mean, const ops::MaybeTensor& running_var);

/// What a backward pass reads is there and fits dy. It is not taken for granted: a hook on saved tensors may have given
/// back anything.
/// @param through_statistics  whether the statistics take gradients: `saved` then has six rows, else three, and x is
/// there if dx is asked for
void check_backward(const at::Tensor& dy, const ops::MaybeTensor& x, const ops::MaybeTensor& y,
                    const ops::MaybeTensor& weight, const ops::MaybeTensor& bias, const at::Tensor& saved, bool relu,
                    const ops::OutputMask& output_mask, bool through_statistics);

/// Whether `saved` comes from a forward pass whose statistics take gradients.
inline bool is_through_statistics(const at::Tensor& saved) { return saved.sym_size(0) != 3; }

template <typename Backward>
void check_backward(const Backward& call, bool relu) {
  check_backward(call.dy, call.x, call.y, call.weight, call.bias, call.saved, relu, call.output_mask,
                 call.saved.dim() == 2 && is_through_statistics(call.saved));
}

void check_gradient_sums(const ops::GradientSums& call, bool relu);
void check_gradient_of_input(const ops::GradientOfInput& call, bool relu);
void check_advance_schedule(const ops::AdvanceSchedule& call);

}  // namespace momentum_bn
