#include "ops/ops.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace momentum_bn::ops {
namespace {

template <typename Signature>
c10::TypedOperatorHandle<Signature> handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

at::Tensor batch_statistics(const at::Tensor& x) {
  static const auto op = handle<BatchStatistics>("momentum_bn::_batch_statistics");
  return op.call(x);
}

at::Tensor group_statistics(const at::Tensor& x, Word process_group) {
  static const auto op = handle<GroupStatistics>("momentum_bn::_group_statistics");
  return op.call(x, process_group);
}

std::tuple<at::Tensor, at::Tensor> forward_train(const at::Tensor& x, const MaybeTensor& residual,
                                                 const MaybeTensor& weight, const MaybeTensor& bias,
                                                 at::TensorList state, double eps, int64_t total_iters,
                                                 int64_t views_per_update, Word schedule, Word variance,
                                                 MaybeWord activation, MaybeWord process_group,
                                                 const MaybeTensor& group_statistics) {
  static const auto op = handle<ForwardTrain>("momentum_bn::_forward_train");
  return op.call(x, residual, weight, bias, state, eps, total_iters, views_per_update, schedule, variance, activation,
                 process_group, group_statistics);
}

at::Tensor forward_train_(at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight,
                          const MaybeTensor& bias, at::TensorList state, double eps, int64_t total_iters,
                          int64_t views_per_update, Word schedule, Word variance, MaybeWord activation,
                          MaybeWord process_group, const MaybeTensor& group_statistics) {
  static const auto op = handle<ForwardTrainInplace>("momentum_bn::_forward_train_");
  return op.call(x, residual, weight, bias, state, eps, total_iters, views_per_update, schedule, variance, activation,
                 process_group, group_statistics);
}

void forward_eval_(at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight, const MaybeTensor& bias,
                   const at::Tensor& running_mean, const at::Tensor& running_var, double eps, MaybeWord activation) {
  static const auto op = handle<ForwardEvalInplace>("momentum_bn::_forward_eval_");
  op.call(x, residual, weight, bias, running_mean, running_var, eps, activation);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_functional(
    const at::Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& running_mean,
    const MaybeTensor& running_var, double momentum, double eps, Word variance) {
  static const auto op = handle<ForwardFunctional>("momentum_bn::_forward_functional");
  return op.call(x, weight, bias, running_mean, running_var, momentum, eps, variance);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& dy, const MaybeTensor& x,
                                                                    const MaybeTensor& y, const MaybeTensor& weight,
                                                                    const at::Tensor& saved, MaybeWord activation,
                                                                    std::array<bool, 4> output_mask) {
  static const auto op = handle<Backward>("momentum_bn::_backward");
  return op.call(dy, x, y, weight, saved, activation, output_mask);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_(at::Tensor& dy, const MaybeTensor& x, const MaybeTensor& y,
                                                         const MaybeTensor& weight, const at::Tensor& saved,
                                                         MaybeWord activation, std::array<bool, 4> output_mask) {
  static const auto op = handle<BackwardInplace>("momentum_bn::_backward_");
  return op.call(dy, x, y, weight, saved, activation, output_mask);
}

void advance_schedule_(at::Tensor& cur_iter, at::Tensor& momentum, int64_t total_iters, Word schedule) {
  static const auto op = handle<AdvanceSchedule>("momentum_bn::_advance_schedule_");
  op.call(cur_iter, momentum, total_iters, schedule);
}

void teacher_update_(at::TensorList teacher, at::TensorList master, at::TensorList student, at::Tensor& updates,
                     int64_t total_iters, double param_momentum) {
  static const auto op = handle<TeacherUpdate>("momentum_bn::_teacher_update_");
  op.call(teacher, master, student, updates, total_iters, param_momentum);
}

}  // namespace momentum_bn::ops
