// Shapes, dtypes and memory formats of the operators' results, without values: for meta tensors and for tracing.

#include "ops/checks.h"
#include "ops/composite/formulas.h"
#include "ops/group.h"
#include "ops/inputs.h"
#include "ops/ops.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace momentum_bn::meta {
namespace {

using ops::MaybeTensor;
using ops::MaybeWord;
using ops::Word;

at::Tensor saved_like(const at::Tensor& x) {
  return at::empty_symint({3, x.sym_size(1)}, x.options().dtype(composite::accumulate_type(x.scalar_type())));
}

at::Tensor per_channel_like(const at::Tensor& x, at::ScalarType dtype) {
  return at::empty_symint({x.sym_size(1)}, x.options().dtype(dtype));
}

at::Tensor batch_statistics(const at::Tensor& x) {
  check_input(x, std::nullopt);
  return at::empty_symint({2 * x.sym_size(1) + 1}, x.options().dtype(composite::blend_type(x)));
}

at::Tensor group_statistics(const at::Tensor& x, Word process_group) {
  const auto local = batch_statistics(x);
  return at::empty_symint({ranks_of_process_group(process_group), local.sym_size(0)}, local.options());
}

std::tuple<at::Tensor, at::Tensor> forward_train(const at::Tensor& x, const MaybeTensor& residual,
                                                 const MaybeTensor& weight, const MaybeTensor& bias,
                                                 at::TensorList state, double eps, int64_t total_iters,
                                                 int64_t views_per_update, Word schedule, Word variance,
                                                 MaybeWord activation, MaybeWord process_group,
                                                 const MaybeTensor& group_statistics) {
  checked_config(eps, total_iters, views_per_update, schedule, variance, activation);
  check_forward_train(x, residual, weight, bias, State::of(state), process_group || group_statistics);
  if (group_statistics) {
    check_gathered(x, *group_statistics);
  }
  return {empty_output(x), saved_like(x)};
}

at::Tensor forward_train_(at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight,
                          const MaybeTensor& bias, at::TensorList state, double eps, int64_t total_iters,
                          int64_t views_per_update, Word schedule, Word variance, MaybeWord activation,
                          MaybeWord process_group, const MaybeTensor& group_statistics) {
  checked_config(eps, total_iters, views_per_update, schedule, variance, activation);
  check_forward_train(x, residual, weight, bias, State::of(state), process_group || group_statistics);
  if (group_statistics) {
    check_gathered(x, *group_statistics);
  }
  return saved_like(x);
}

void forward_eval_(at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight, const MaybeTensor& bias,
                   const at::Tensor& running_mean, const at::Tensor& running_var, double eps, MaybeWord activation) {
  check_eps(eps);
  activation_of(activation);
  check_forward_eval(x, residual, weight, bias, running_mean, running_var);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_functional(
    const at::Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& running_mean,
    const MaybeTensor& running_var, double momentum, double eps, Word variance) {
  variance_of(variance);
  check_forward_functional(x, weight, bias, running_mean, running_var, momentum, eps);
  const auto type = composite::accumulate_type(x.scalar_type());
  return {empty_output(x), per_channel_like(x, type), per_channel_like(x, type), saved_like(x)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& dy, const MaybeTensor& x,
                                                                    const MaybeTensor& y, const MaybeTensor& weight,
                                                                    const at::Tensor& saved, MaybeWord activation,
                                                                    std::array<bool, 4> output_mask) {
  check_backward(dy, x, y, weight, saved, activation_of(activation) == Activation::ReLU, output_mask);
  const auto accumulate = composite::accumulate_type(dy.scalar_type());
  return {output_mask[0] ? empty_output(dy) : at::Tensor(),
          output_mask[1] ? per_channel_like(dy, weight->scalar_type()) : at::Tensor(),
          output_mask[2] ? per_channel_like(dy, accumulate) : at::Tensor(),
          output_mask[3] ? empty_output(dy) : at::Tensor()};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_(at::Tensor& dy, const MaybeTensor& x, const MaybeTensor& y,
                                                         const MaybeTensor& weight, const at::Tensor& saved,
                                                         MaybeWord activation, std::array<bool, 4> output_mask) {
  output_mask[0] = false;
  auto [_, dweight, dbias, dresidual] = backward(dy, x, y, weight, saved, activation, output_mask);
  return {dweight, dbias, dresidual};
}

void advance_schedule_(at::Tensor& cur_iter, at::Tensor& momentum, int64_t total_iters, Word schedule) {
  check_schedule(cur_iter, momentum);
  check_total_iters(total_iters);
  schedule_of(schedule);
}

void teacher_update_(at::TensorList teacher, at::TensorList master, at::TensorList student, at::Tensor& updates,
                     int64_t total_iters, double param_momentum) {
  check_pairs(teacher, master, student, updates);
  check_total_iters(total_iters);
  check_param_momentum(param_momentum);
}

}  // namespace

TORCH_LIBRARY_IMPL(momentum_bn, Meta, m) {
  m.impl("_batch_statistics", batch_statistics);
  m.impl("_group_statistics", group_statistics);
  m.impl("_forward_train", forward_train);
  m.impl("_forward_train_", forward_train_);
  m.impl("_forward_eval_", forward_eval_);
  m.impl("_forward_functional", forward_functional);
  m.impl("_backward", backward);
  m.impl("_backward_", backward_);
  m.impl("_advance_schedule_", advance_schedule_);
  m.impl("_teacher_update_", teacher_update_);
}

}  // namespace momentum_bn::meta
