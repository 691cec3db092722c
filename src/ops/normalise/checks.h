#pragma once

#include "ops/normalise/calls.h"
#include "ops/normalise/state.h"

#include <ATen/core/Tensor.h>

// The checks of each operator's inputs as a whole, shared by its implementations: every tensor that a kernel is handed
// has the dtype, shape, device and layout that it reads. All of them throw before anything was changed.

namespace momentum_bn {

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

/// No two elements of x share memory.
void check_writable(const at::Tensor& x);

}  // namespace momentum_bn
