// Version counters: whoever saved a tensor that an operator changes must find out.

#include "ops/ops.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

namespace momentum_bn::versions {
namespace {

using ops::MaybeTensor;
using ops::MaybeWord;
using ops::Word;

void increment_version(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

void increment_versions(at::TensorList tensors) {
  for (const auto& tensor : tensors) increment_version(tensor);
}

std::tuple<at::Tensor, at::Tensor> forward_train(const at::Tensor& x, const MaybeTensor& residual,
                                                 const MaybeTensor& weight, const MaybeTensor& bias,
                                                 at::TensorList state, double eps, int64_t total_iters,
                                                 int64_t views_per_update, Word schedule, Word variance,
                                                 MaybeWord activation, MaybeWord process_group,
                                                 const MaybeTensor& group_statistics) {
  at::AutoDispatchBelowADInplaceOrView below;
  auto result = ops::forward_train(x, residual, weight, bias, state, eps, total_iters, views_per_update, schedule,
                                   variance, activation, process_group, group_statistics);
  increment_versions(state);
  return result;
}

at::Tensor forward_train_(at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight,
                          const MaybeTensor& bias, at::TensorList state, double eps, int64_t total_iters,
                          int64_t views_per_update, Word schedule, Word variance, MaybeWord activation,
                          MaybeWord process_group, const MaybeTensor& group_statistics) {
  at::AutoDispatchBelowADInplaceOrView below;
  auto saved = ops::forward_train_(x, residual, weight, bias, state, eps, total_iters, views_per_update, schedule,
                                   variance, activation, process_group, group_statistics);
  increment_version(x);
  increment_versions(state);
  return saved;
}

void forward_eval_(at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight, const MaybeTensor& bias,
                   const at::Tensor& running_mean, const at::Tensor& running_var, double eps, MaybeWord activation) {
  at::AutoDispatchBelowADInplaceOrView below;
  ops::forward_eval_(x, residual, weight, bias, running_mean, running_var, eps, activation);
  increment_version(x);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_(at::Tensor& dy, const MaybeTensor& x, const MaybeTensor& y,
                                                         const MaybeTensor& weight, const at::Tensor& saved,
                                                         MaybeWord activation, std::array<bool, 4> output_mask) {
  at::AutoDispatchBelowADInplaceOrView below;
  auto result = ops::backward_(dy, x, y, weight, saved, activation, output_mask);
  increment_version(dy);
  return result;
}

void advance_schedule_(at::Tensor& cur_iter, at::Tensor& momentum, int64_t total_iters, Word schedule) {
  at::AutoDispatchBelowADInplaceOrView below;
  ops::advance_schedule_(cur_iter, momentum, total_iters, schedule);
  increment_version(cur_iter);
  increment_version(momentum);
}

void teacher_update_(at::TensorList teacher, at::TensorList master, at::TensorList student, at::Tensor& updates,
                     int64_t total_iters, double param_momentum) {
  at::AutoDispatchBelowADInplaceOrView below;
  ops::teacher_update_(teacher, master, student, updates, total_iters, param_momentum);
  increment_versions(teacher);
  increment_versions(master);
  increment_version(updates);
}

}  // namespace

TORCH_LIBRARY_IMPL(momentum_bn, ADInplaceOrView, m) {
  m.impl("_forward_train", forward_train);
  m.impl("_forward_train_", forward_train_);
  m.impl("_forward_eval_", forward_eval_);
  m.impl("_backward_", backward_);
  m.impl("_advance_schedule_", advance_schedule_);
  m.impl("_teacher_update_", teacher_update_);
}

}  // namespace momentum_bn::versions
