// The operators for every device without kernels of its own, and under torch.func.vmap, which has rules of its own for
// the at:: operations that they are made of.

#include "ops/checks.h"
#include "ops/composite/formulas.h"
#include "ops/inputs.h"
#include "ops/ops.h"

#include <ATen/ATen.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <torch/library.h>

namespace momentum_bn::composite {
namespace {

using ops::MaybeTensor;
using ops::MaybeWord;
using ops::Word;

std::tuple<at::Tensor, at::Tensor> forward_train(const at::Tensor& x, const MaybeTensor& residual,
                                                 const MaybeTensor& weight, const MaybeTensor& bias,
                                                 at::TensorList state, double eps, int64_t total_iters,
                                                 int64_t views_per_update, Word schedule, Word variance,
                                                 MaybeWord activation, MaybeWord process_group,
                                                 const MaybeTensor& group_statistics) {
  return train_forward(x, residual, weight, bias, State::of(state),
                       checked_config(eps, total_iters, views_per_update, schedule, variance, activation),
                       {process_group, group_statistics});
}

at::Tensor forward_train_(at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight,
                          const MaybeTensor& bias, at::TensorList state, double eps, int64_t total_iters,
                          int64_t views_per_update, Word schedule, Word variance, MaybeWord activation,
                          MaybeWord process_group, const MaybeTensor& group_statistics) {
  check_writable(x);
  auto [y, saved] = forward_train(x, residual, weight, bias, state, eps, total_iters, views_per_update, schedule,
                                  variance, activation, process_group, group_statistics);
  x.copy_(y);
  return saved;
}

void forward_eval_(at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight, const MaybeTensor& bias,
                   const at::Tensor& running_mean, const at::Tensor& running_var, double eps, MaybeWord activation) {
  check_eps(eps);
  const auto act = activation_of(activation);
  check_forward_eval(x, residual, weight, bias, running_mean, running_var);
  check_writable(x);
  x.copy_(evaluate(x, residual, weight, bias, running_mean, running_var, eps, act));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_functional(
    const at::Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& running_mean,
    const MaybeTensor& running_var, double momentum, double eps, Word variance) {
  return functional_forward(x, weight, bias, running_mean, running_var, momentum, eps, variance_of(variance));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& dy, const MaybeTensor& x,
                                                                    const MaybeTensor& y, const MaybeTensor& weight,
                                                                    const at::Tensor& saved, MaybeWord activation,
                                                                    std::array<bool, 4> output_mask) {
  return normalize_backward(dy, x, y, weight, saved, activation_of(activation), output_mask);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_(at::Tensor& dy, const MaybeTensor& x, const MaybeTensor& y,
                                                         const MaybeTensor& weight, const at::Tensor& saved,
                                                         MaybeWord activation, std::array<bool, 4> output_mask) {
  output_mask[0] = true;
  auto [dx, dweight, dbias, dresidual] = backward(dy, x, y, weight, saved, activation, output_mask);
  dy.copy_(dx);
  return {dweight, dbias, dresidual};
}

void advance_schedule_(at::Tensor& cur_iter, at::Tensor& momentum, int64_t total_iters, Word schedule) {
  check_schedule(cur_iter, momentum);
  check_total_iters(total_iters);
  advance_schedule(cur_iter, momentum, total_iters, schedule_of(schedule), {});
}

/// One state cannot take in many examples at once, and a collective is not mapped.
void check_can_be_mapped(const at::Tensor& x, at::TensorList state, bool in_group) {
  TORCH_CHECK_VALUE(!in_group,
                    "torch.func.vmap maps a training forward of Momentum BatchNorm with a process_group, whose "
                    "collective cannot be mapped. Use process_group=None.");
  TORCH_CHECK_VALUE(
      state.empty() || !at::functorch::isBatchedTensor(x) || at::functorch::isBatchedTensor(state[0]),
      "torch.func.vmap maps a training forward of Momentum BatchNorm over its input, but not over its state, which all "
      "examples would update at once. Use momentum_bn.functional.momentum_batch_norm, which changes nothing; or a "
      "state "
      "per example (torch.func.stack_module_state and functional_call); or none "
      "(torch.func.replace_all_batch_norm_modules_).");
}

std::tuple<at::Tensor, at::Tensor> mapped_forward_train(const at::Tensor& x, const MaybeTensor& residual,
                                                        const MaybeTensor& weight, const MaybeTensor& bias,
                                                        at::TensorList state, double eps, int64_t total_iters,
                                                        int64_t views_per_update, Word schedule, Word variance,
                                                        MaybeWord activation, MaybeWord process_group,
                                                        const MaybeTensor& group_statistics) {
  check_can_be_mapped(x, state, process_group || group_statistics);
  return forward_train(x, residual, weight, bias, state, eps, total_iters, views_per_update, schedule, variance,
                       activation, process_group, group_statistics);
}

at::Tensor mapped_forward_train_(at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight,
                                 const MaybeTensor& bias, at::TensorList state, double eps, int64_t total_iters,
                                 int64_t views_per_update, Word schedule, Word variance, MaybeWord activation,
                                 MaybeWord process_group, const MaybeTensor& group_statistics) {
  check_can_be_mapped(x, state, process_group || group_statistics);
  return forward_train_(x, residual, weight, bias, state, eps, total_iters, views_per_update, schedule, variance,
                        activation, process_group, group_statistics);
}

at::Tensor mapped_batch_statistics(const at::Tensor& x) {
  check_can_be_mapped(x, {}, /*in_group=*/true);
  return {};
}

at::Tensor mapped_group_statistics(const at::Tensor& x, Word /*process_group*/) { return mapped_batch_statistics(x); }

}  // namespace

TORCH_LIBRARY_IMPL(momentum_bn, CompositeExplicitAutograd, m) {
  m.impl("_batch_statistics", packed_statistics);
  m.impl("_forward_train", forward_train);
  m.impl("_forward_train_", forward_train_);
  m.impl("_forward_eval_", forward_eval_);
  m.impl("_forward_functional", forward_functional);
  m.impl("_backward", backward);
  m.impl("_backward_", backward_);
  m.impl("_advance_schedule_", advance_schedule_);
  m.impl("_teacher_update_", teacher_update);
}

TORCH_LIBRARY_IMPL(momentum_bn, FuncTorchBatched, m) {
  m.impl("_batch_statistics", mapped_batch_statistics);
  m.impl("_group_statistics", mapped_group_statistics);
  m.impl("_forward_train", mapped_forward_train);
  m.impl("_forward_train_", mapped_forward_train_);
  m.impl("_forward_eval_", forward_eval_);
  m.impl("_forward_functional", forward_functional);
}

}  // namespace momentum_bn::composite
