// The operators for every device without kernels of its own.

#include "ops/checks.h"
#include "ops/composite/formulas.h"
#include "ops/inputs.h"
#include "ops/ops.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace momentum_bn::composite {
namespace {

using ops::MaybeTensor;
using ops::MaybeWord;
using ops::Word;

/// Statistics of the batch blended with the state, which takes the batch in. The rows of `saved`.
at::Tensor take_in(const at::Tensor& x, State& state, const Config& config) {
  const auto batch = batch_statistics(x);
  const auto saved =
      blend(x, batch, state.running_mean, state.running_var, current_momentum(state), config.eps, config.variance);
  update_state(state, batch, values_per_channel(x), config);
  return saved;
}

std::tuple<at::Tensor, at::Tensor> forward_train(const at::Tensor& x, const MaybeTensor& residual,
                                                 const MaybeTensor& weight, const MaybeTensor& bias,
                                                 at::TensorList state_tensors, double eps, int64_t total_iters,
                                                 int64_t views_per_update, Word schedule, Word variance,
                                                 MaybeWord activation) {
  const auto config = checked_config(eps, total_iters, views_per_update, schedule, variance, activation);
  auto state = State::of(state_tensors);
  if (!check_forward_train(x, residual, weight, bias, state)) return {empty_output(x), zero_saved(x)};
  const auto saved = take_in(x, state, config);
  return {normalize(x, saved, weight, bias, residual, config.activation), saved};
}

at::Tensor forward_train_(at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight,
                          const MaybeTensor& bias, at::TensorList state_tensors, double eps, int64_t total_iters,
                          int64_t views_per_update, Word schedule, Word variance, MaybeWord activation) {
  const auto config = checked_config(eps, total_iters, views_per_update, schedule, variance, activation);
  auto state = State::of(state_tensors);
  check_writable(x);
  if (!check_forward_train(x, residual, weight, bias, state)) return zero_saved(x);
  const auto saved = take_in(x, state, config);
  x.copy_(normalize(x, saved, weight, bias, residual, config.activation));
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
  const auto variance_used = variance_of(variance);
  if (!check_forward_functional(x, weight, bias, running_mean, running_var, momentum, eps)) {
    const auto nothing = at::zeros({x.size(1)}, x.options().dtype(accumulate_type(x.scalar_type())));
    return {empty_output(x), nothing, nothing.clone(), zero_saved(x)};
  }
  const auto batch = batch_statistics(x);
  const bool tracks = running_mean && running_mean->defined();
  const auto saved = blend(x, batch, tracks ? *running_mean : at::Tensor(), tracks ? *running_var : at::Tensor(),
                           tracks ? at::full({}, momentum, running_mean->options().dtype(at::kFloat)) : at::Tensor(),
                           eps, variance_used);
  return {normalize(x, saved, weight, bias, std::nullopt, Activation::None), batch.mean + batch.mean_rest, batch.var,
          saved};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& dy, const MaybeTensor& x,
                                                                    const MaybeTensor& y, const MaybeTensor& weight,
                                                                    const at::Tensor& saved, MaybeWord activation,
                                                                    std::array<bool, 4> output_mask) {
  return normalize_backward(dy, x, y, weight, saved, activation_of(activation), output_mask);
}

void advance_schedule_(at::Tensor& cur_iter, at::Tensor& momentum, int64_t total_iters, Word schedule) {
  check_total_iters(total_iters);
  advance_schedule(cur_iter, momentum, total_iters, schedule_of(schedule), {});
}

void teacher_update_(at::TensorList teacher, at::TensorList master, at::TensorList student, at::Tensor& updates,
                     int64_t total_iters, double param_momentum) {
  check_pairs(teacher, master, student);
  check_total_iters(total_iters);
  check_param_momentum(param_momentum);
  const auto type = updates.device().is_mps() ? at::kFloat : at::kDouble;
  const auto progress = updates.clamp_max(total_iters).to(type) / total_iters;
  const auto weight_of_student = ((progress * M_PI).cos() + 1) * (0.5 * (1 - param_momentum));
  for (size_t i = 0; i < teacher.size(); ++i) {
    const bool has_master = master[i].numel() > 0;
    const auto& average = has_master ? master[i] : teacher[i];
    average.lerp_(student[i].to(average.scalar_type()), weight_of_student.to(average.options()));
    if (has_master) teacher[i].copy_(average);
  }
  updates.add_(1);
}

}  // namespace

TORCH_LIBRARY_IMPL(momentum_bn, CompositeExplicitAutograd, m) {
  m.impl("_forward_train", forward_train);
  m.impl("_forward_train_", forward_train_);
  m.impl("_forward_eval_", forward_eval_);
  m.impl("_forward_functional", forward_functional);
  m.impl("_backward", backward);
  m.impl("_advance_schedule_", advance_schedule_);
  m.impl("_teacher_update_", teacher_update_);
}

}  // namespace momentum_bn::composite
