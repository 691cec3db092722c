// Shapes, dtypes and memory formats of the results of the operators that normalise, without values: for meta tensors
// and for tracing.

#include "ops/normalise/calls.h"
#include "ops/normalise/inputs.h"
#include "ops/normalise/options.h"
#include "ops/shared/group.h"
#include "ops/shared/kernel_tensors.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace momentum_bn::meta {
namespace {

at::Tensor batch_statistics(const ops::BatchStatistics& call) {
  check_input(call.x, std::nullopt);
  return at::empty_symint({2 * call.x.sym_size(1) + 1}, call.x.options().dtype(blend_type(call.x)));
}

at::Tensor group_statistics(const ops::GroupStatistics& call) {
  const auto local = batch_statistics({call.x});
  return at::empty_symint({ranks_of_process_group(call.process_group), local.sym_size(0)}, local.options());
}

template <typename Train>
at::Tensor saved_of(const Train& call) {
  check_options(call.options);
  check_forward_train(inputs_of(call), State::of(call.state), call.process_group || call.group_statistics);
  if (call.group_statistics) {
    check_gathered(call.x, *call.group_statistics);
  }
  return empty_saved(call.x, call.options.detach_statistics);
}

std::tuple<at::Tensor, at::Tensor> forward_train(const ops::ForwardTrain& call) {
  auto saved = saved_of(call);
  return {empty_output(call.x), saved};
}

at::Tensor forward_train_(const ops::ForwardTrainInplace& call) { return saved_of(call); }

void forward_eval_(const ops::ForwardEvalInplace& call) {
  is_relu(call.activation);
  check_forward_eval(call);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_functional(const ops::ForwardFunctional& call) {
  variance_of(call.variance);
  check_forward_functional(call);
  const auto type = accumulate_type(call.x.scalar_type());
  return {empty_output(call.x), empty_per_channel(call.x, type), empty_per_channel(call.x, type), empty_saved(call.x)};
}

/// dweight, dbias and dresidual.
template <typename Backward>
std::tuple<at::Tensor, at::Tensor, at::Tensor> parameter_gradients(const Backward& call) {
  const at::Tensor& dy = call.dy;
  return {call.output_mask[1] ? empty_per_channel(dy, call.weight->scalar_type()) : at::Tensor(),
          call.output_mask[2] ? empty_per_channel(dy, accumulate_type(dy.scalar_type())) : at::Tensor(),
          call.output_mask[3] ? empty_output(dy) : at::Tensor()};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(const ops::Backward& call) {
  check_backward(call, is_relu(call.activation));
  auto [dweight, dbias, dresidual] = parameter_gradients(call);
  return {call.output_mask[0] ? empty_output(call.dy) : at::Tensor(), dweight, dbias, dresidual};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_(const ops::BackwardInplace& call) {
  check_backward(call, is_relu(call.activation));
  return parameter_gradients(call);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gradient_sums(const ops::GradientSums& call) {
  check_gradient_sums(call, is_relu(call.activation));
  auto [dweight, dbias, dresidual] = parameter_gradients(call);
  const auto options = call.dy.options().dtype(blend_type(call.dy));
  return {at::empty_symint({2, call.dy.sym_size(1)}, options), dweight, dbias, dresidual};
}

at::Tensor gradient_of_input(const ops::GradientOfInput& call) {
  check_gradient_of_input(call, is_relu(call.activation));
  return empty_output(call.dy);
}

}  // namespace

TORCH_LIBRARY_IMPL(momentum_bn, Meta, m) {
  ops::implement<batch_statistics, group_statistics, forward_train, forward_train_, forward_eval_, forward_functional,
                 backward, backward_, gradient_sums, gradient_of_input, check_advance_schedule>(m);
}

}  // namespace momentum_bn::meta
