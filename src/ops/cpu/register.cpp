// The operators on the CPU: tensors to pointers, state to numbers, and back. The arithmetic on values is in
// kernels/cpu.

#include "kernels/cpu/dispatch.h"
#include "ops/checks.h"
#include "ops/composite/formulas.h"
#include "ops/cpu/blend.h"
#include "ops/cpu/kept_memory.h"
#include "ops/cpu/merged_statistics.h"
#include "ops/cpu/parallel_for.h"
#include "ops/group.h"
#include "ops/inputs.h"
#include "ops/kernel_arguments.h"
#include "ops/ops.h"

#include <ATen/ops/_foreach_lerp.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <momentum_bn/schedule.h>
#include <torch/library.h>

namespace momentum_bn::cpu {
namespace {

using ops::MaybeTensor;
using ops::MaybeWord;
using ops::Word;

/// What one forward pass has beside x and the parameters.
struct Pass {
  const MaybeTensor& residual;
  const MaybeTensor& weight;
  const MaybeTensor& bias;
  bool relu;
  const at::Tensor& saved;
  const kernels::BlendArgs& blend;
  MergedStatistics* group = nullptr;  // or null: x normalises itself by itself
};

/// Runs the forward kernels on x into y, which is dense in `format` and may be x. warm: see FreshOutput.
void run_forward(const at::Tensor& x, const at::Tensor& y, bool warm, at::MemoryFormat format, const Pass& pass) {
  const auto dense_x = x.contiguous(format);
  const auto residual = dense(pass.residual, format);
  const ChannelArray weight(pass.weight, pass.saved.scalar_type());
  const ChannelArray bias(pass.bias, pass.saved.scalar_type());
  kernels::ForwardArgs args = {};
  args.type = kernel_type(dense_x.scalar_type());
  args.shape = shape_of(dense_x, format);
  args.x = dense_x.const_data_ptr();
  args.residual = data_or_null(residual);
  args.y = y.data_ptr();
  args.relu = pass.relu;
  args.stream = warm;
  args.weight = weight.data();
  args.bias = bias.data();
  args.saved = pass.saved.data_ptr();
  args.saved_rows = kernels::kSavedRows;
  args.blend = &pass.blend;
  if (pass.group) {
    args.mean = pass.group->mean.data();
    args.m2 = pass.group->m2.data();
    args.statistics_given = true;
  }
  args.parallel_for = parallel_for;
  kernels::table().forward(args);
}

/// The same where x is to hold the result, whatever its strides.
void run_forward_inplace(at::Tensor& x, const Pass& pass) {
  const auto format = x.suggest_memory_format();
  if (x.is_contiguous(format) && !overwrites_residual(x, pass.residual)) {
    return run_forward(x, x, /*warm=*/false, format, pass);
  }
  const auto y = fresh_output(x);
  run_forward(x, y.tensor, y.warm, format, pass);
  x.copy_(y.tensor);
}

/// What this process tells the others of its batch, which may be empty: see schemas.cpp.
at::Tensor batch_statistics(const at::Tensor& x) {
  check_input(x, std::nullopt);
  const int64_t channels = x.size(1);
  auto statistics = at::zeros({2 * channels + 1}, x.options().dtype(at::kDouble));
  if (x.numel() == 0) return statistics;
  const auto format = x.suggest_memory_format();
  const auto dense_x = x.contiguous(format);
  kernels::StatisticsArgs args = {};
  args.type = kernel_type(dense_x.scalar_type());
  args.shape = shape_of(dense_x, format);
  args.x = dense_x.const_data_ptr();
  args.mean = statistics.mutable_data_ptr<double>();
  args.m2 = args.mean + channels;
  args.parallel_for = parallel_for;
  kernels::table().statistics(args);
  args.m2[channels] = values_per_channel(x);
  return statistics;
}

/// What a training forward pass normalises x by.
struct TrainStatistics {
  /// No value at all: nothing to compute and nothing to count.
  bool empty;
  double values_per_channel;
  std::optional<MergedStatistics> group;

  MergedStatistics* group_or_null() { return group ? &*group : nullptr; }
};

/// Checks the inputs, then asks the other processes of the group, if there is one.
TrainStatistics train_statistics(const at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight,
                                 const MaybeTensor& bias, const State& state, const Group& processes) {
  const bool any = check_forward_train(x, residual, weight, bias, state, processes.has_others());
  if (!processes.has_others()) return {!any, any ? values_per_channel(x) : 0, std::nullopt};
  MergedStatistics group(processes.statistics(x));
  check_group_statistics(x, group.count);
  return {group.count == 0, group.count, std::move(group)};
}

std::tuple<at::Tensor, at::Tensor> forward_train(const at::Tensor& x, const MaybeTensor& residual,
                                                 const MaybeTensor& weight, const MaybeTensor& bias,
                                                 at::TensorList state_tensors, double eps, int64_t total_iters,
                                                 int64_t views_per_update, Word schedule, Word variance,
                                                 MaybeWord activation, MaybeWord process_group,
                                                 const MaybeTensor& group_statistics) {
  const auto config = checked_config(eps, total_iters, views_per_update, schedule, variance, activation);
  auto state = State::of(state_tensors);
  auto statistics = train_statistics(x, residual, weight, bias, state, Group(process_group, group_statistics));
  const auto [y, warm] = fresh_output(x);
  if (statistics.empty) return {y, zero_saved(x)};
  auto saved = empty_saved(x);
  StateBlend blend(statistics.values_per_channel, saved.scalar_type(), state, config);
  run_forward(
      x, y, warm, x.suggest_memory_format(),
      {residual, weight, bias, config.activation == Activation::ReLU, saved, blend.args(), statistics.group_or_null()});
  blend.finish();
  return {y, saved};
}

at::Tensor forward_train_(at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight,
                          const MaybeTensor& bias, at::TensorList state_tensors, double eps, int64_t total_iters,
                          int64_t views_per_update, Word schedule, Word variance, MaybeWord activation,
                          MaybeWord process_group, const MaybeTensor& group_statistics) {
  const auto config = checked_config(eps, total_iters, views_per_update, schedule, variance, activation);
  auto state = State::of(state_tensors);
  check_writable(x);
  auto statistics = train_statistics(x, residual, weight, bias, state, Group(process_group, group_statistics));
  if (statistics.empty) return zero_saved(x);
  auto saved = empty_saved(x);
  StateBlend blend(statistics.values_per_channel, saved.scalar_type(), state, config);
  run_forward_inplace(x, {residual, weight, bias, config.activation == Activation::ReLU, saved, blend.args(),
                          statistics.group_or_null()});
  blend.finish();
  return saved;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_functional(
    const at::Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& running_mean,
    const MaybeTensor& running_var, double momentum, double eps, Word variance) {
  const auto variance_used = variance_of(variance);
  const bool any = check_forward_functional(x, weight, bias, running_mean, running_var, momentum, eps);
  const auto [y, warm] = fresh_output(x);
  const auto options = x.options().dtype(composite::accumulate_type(x.scalar_type()));
  auto b_mean = at::zeros({x.size(1)}, options);
  auto b_var = at::zeros({x.size(1)}, options);
  if (!any) return {y, b_mean, b_var, zero_saved(x)};
  auto saved = empty_saved(x);
  const FunctionalBlend blend(values_per_channel(x), running_mean, running_var, {momentum, eps, variance_used}, b_mean,
                              b_var);
  run_forward(x, y, warm, x.suggest_memory_format(), {std::nullopt, weight, bias, false, saved, blend.args()});
  return {y, b_mean, b_var, saved};
}

/// Runs the backward kernels; dx is undefined where it is not wanted, else dense like dy, or dy itself. Returns
/// dweight, dbias and dresidual.
std::tuple<at::Tensor, at::Tensor, at::Tensor> run_backward(const at::Tensor& dy, const FreshOutput& dx,
                                                            const MaybeTensor& x, const MaybeTensor& y,
                                                            const MaybeTensor& weight, const at::Tensor& saved,
                                                            MaybeWord activation, std::array<bool, 4> output_mask) {
  const auto format = dy.suggest_memory_format();
  const bool relu = activation_of(activation) == Activation::ReLU;
  const FreshOutput dresidual = output_mask[3] ? fresh_output(dy) : FreshOutput{at::Tensor(), dx.warm};
  at::Tensor dweight = output_mask[1] ? at::empty({dy.size(1)}, weight->options()) : at::Tensor();
  at::Tensor dbias = output_mask[2] ? at::empty({dy.size(1)}, saved.options()) : at::Tensor();
  if (dy.numel() == 0) {
    for (const auto& sums : {dweight, dbias}) {
      if (sums.defined()) sums.zero_();
    }
    return {dweight, dbias, dresidual.tensor};
  }

  const auto dense_dy = dy.contiguous(format);
  const auto dense_x = output_mask[1] ? dense(x, format) : at::Tensor();
  const auto dense_y = relu ? dense(y, format) : at::Tensor();
  kernels::BackwardArgs args = {};
  args.type = kernel_type(dy.scalar_type());
  args.shape = shape_of(dy, format);
  args.dy = dense_dy.const_data_ptr();
  args.x = data_or_null(dense_x);
  args.relu = relu;
  args.y = data_or_null(dense_y);
  args.dx = dx.tensor.defined() ? dx.tensor.data_ptr() : nullptr;
  args.dresidual = dresidual.tensor.defined() ? dresidual.tensor.data_ptr() : nullptr;
  args.stream = dx.warm && dresidual.warm;
  const auto dense_saved = saved.contiguous();
  const ChannelArray weights(weight, saved.scalar_type());
  const ChannelArray dweights(dweight, saved.scalar_type());
  const ChannelArray dbiases(dbias, saved.scalar_type());
  args.saved = dense_saved.const_data_ptr();
  args.weight = weights.data();
  args.dweight = dweights.data();
  args.dbias = dbiases.data();
  args.parallel_for = parallel_for;
  kernels::table().backward(args);
  dweights.write_back();
  dbiases.write_back();
  return {dweight, dbias, dresidual.tensor};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& dy, const MaybeTensor& x,
                                                                    const MaybeTensor& y, const MaybeTensor& weight,
                                                                    const at::Tensor& saved, MaybeWord activation,
                                                                    std::array<bool, 4> output_mask) {
  const FreshOutput dx = output_mask[0] ? fresh_output(dy) : FreshOutput{at::Tensor(), true};
  auto [dweight, dbias, dresidual] = run_backward(dy, dx, x, y, weight, saved, activation, output_mask);
  return {dx.tensor, dweight, dbias, dresidual};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_(at::Tensor& dy, const MaybeTensor& x, const MaybeTensor& y,
                                                         const MaybeTensor& weight, const at::Tensor& saved,
                                                         MaybeWord activation, std::array<bool, 4> output_mask) {
  check_writable(dy);
  const bool dense_already = dy.is_contiguous(dy.suggest_memory_format());
  const FreshOutput dx = dense_already ? FreshOutput{dy, false} : fresh_output(dy);
  auto result = run_backward(dy, dx, x, y, weight, saved, activation, output_mask);
  if (!dense_already) dy.copy_(dx.tensor);
  return result;
}

void advance_schedule_(at::Tensor& cur_iter, at::Tensor& momentum, int64_t total_iters, Word schedule) {
  check_total_iters(total_iters);
  advance_schedule(cur_iter, momentum, total_iters, schedule_of(schedule));
}

void teacher_update_(at::TensorList teacher, at::TensorList master, at::TensorList student, at::Tensor& updates,
                     int64_t total_iters, double param_momentum) {
  check_pairs(teacher, master, student);
  const int64_t count = updates.item<int64_t>();
  const double weight_of_student = 1 - teacher_param_momentum(count, total_iters, param_momentum);
  std::vector<at::Tensor> averages;
  std::vector<at::Tensor> values;
  for (size_t i = 0; i < teacher.size(); ++i) {
    averages.push_back(master[i].numel() > 0 ? master[i] : teacher[i]);
    values.push_back(student[i].to(averages.back().scalar_type()));
  }
  if (!averages.empty()) at::_foreach_lerp_(averages, values, weight_of_student);
  for (size_t i = 0; i < teacher.size(); ++i) {
    if (!averages[i].is_same(teacher[i])) teacher[i].copy_(averages[i]);
  }
  updates.fill_(count + 1);
}

}  // namespace

TORCH_LIBRARY_IMPL(momentum_bn, CPU, m) {
  m.impl("_batch_statistics", batch_statistics);
  m.impl("_forward_train", forward_train);
  m.impl("_forward_train_", forward_train_);
  m.impl("_forward_functional", forward_functional);
  m.impl("_backward", backward);
  m.impl("_backward_", backward_);
  m.impl("_advance_schedule_", advance_schedule_);
  m.impl("_teacher_update_", teacher_update_);
}

}  // namespace momentum_bn::cpu
