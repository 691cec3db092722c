#pragma once

#include "ops/normalise/calls.h"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

// The tensors that the operators are given, and what is refused of them, in one set of words for the operators, the C++
// modules and Python: every tensor that a kernel is handed has the dtype, shape, device and layout that it reads. All
// checks throw before anything was changed: c10::ValueError, c10::TypeError for a dtype, and c10::Error where torch's
// own BatchNorm raises a RuntimeError.

namespace momentum_bn {

/// The tensors of `state` (see schemas.cpp). Undefined tensors for what the layer does not have.
/// It is a plain struct, so that autograd does not take them for inputs.
struct State {
  at::Tensor running_mean;         // (C)
  at::Tensor running_var;          // (C)
  at::Tensor num_batches_tracked;  // (), int64
  // Of Momentum BatchNorm alone.
  at::Tensor view_mean_sum;  // (C)
  at::Tensor view_var_sum;   // (C)
  at::Tensor view_count;     // (), int64
  at::Tensor cur_iter;       // (), int64
  at::Tensor momentum;       // (), float64 or float32; negative: cumulative average

  /// @throws c10::ValueError for a number of tensors that is none of those in schemas.cpp
  static State of(at::TensorList tensors);

  bool tracks() const { return running_mean.defined(); }
  /// Whether it is Momentum BatchNorm's.
  bool has_schedule() const { return momentum.defined(); }

  /// The same tensors without gradients, for operations that change them.
  State detached() const;
  /// Shapes, dtypes and devices fit x. Changes nothing.
  void check(const at::Tensor& x) const;
};

/// What of a training forward does not depend on how x is held.
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

// Of single tensors.

/// x is a dense tensor of at least two dimensions, in float32, float64, bfloat16 or float16: what the kernels read. The
/// residual, if any, has its shape and dtype.
void check_input(const at::Tensor& x, const ops::MaybeTensor& residual);
/// `tensor` has the shape and dtype of `like` and is on its device.
void check_same(const at::Tensor& tensor, const char* name, const at::Tensor& like, const char* like_name);
/// The second dimension of x is num_features.
void check_channels(const at::Tensor& x, const c10::SymInt& num_features);
/// `parameter`, if defined, is (C) on x's device, and in float32 or x's dtype.
void check_parameter(const at::Tensor& x, const at::Tensor& parameter, const char* name);
/// No two elements of x share memory.
void check_writable(const at::Tensor& x);
/// A group that normalises itself, x being this process's batch, has more than one value per channel.
void check_group_statistics(const at::Tensor& x, double values_per_channel);

// Of each operator's inputs as a whole.

/// @param has_others  other processes' values are counted, too: this one may have one per channel, or none
/// @return false where x is empty and all there is: nothing to compute and nothing to count
bool check_forward_train(const TrainInputs& inputs, const State& state, bool has_others);

/// @return false where x is empty
bool check_forward_functional(const ops::ForwardFunctional& call);

void check_forward_eval(const ops::ForwardEvalInplace& call);

/// x can be normalised, and what is defined of the others fits it.
void check_parameters(const at::Tensor& x, const ops::MaybeTensor& weight, const ops::MaybeTensor& bias,
                      const ops::MaybeTensor& running_mean, const ops::MaybeTensor& running_var);

/// What a backward pass reads is there and fits dy: a saved-tensor hook may have given back anything.
/// @param through_statistics  six rows of `saved`, and x, must be there; else three or six rows
void check_backward(const at::Tensor& dy, const ops::MaybeTensor& x, const ops::MaybeTensor& y,
                    const ops::MaybeTensor& weight, const ops::MaybeTensor& bias, const at::Tensor& saved, bool relu,
                    const ops::OutputMask& output_mask, bool through_statistics);

/// Whether `saved` is that of a pass whose statistics take gradients.
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
