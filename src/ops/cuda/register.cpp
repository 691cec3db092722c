// The operators on CUDA: tensors to pointers, launches, and back. The arithmetic is in kernels/cuda. Nothing waits for
// the device, but where a rank of a group has fewer than two values per channel (see composite/formulas.h).

#include "kernels/cuda/kernels.h"
#include "ops/checks.h"
#include "ops/composite/formulas.h"
#include "ops/cuda/launch.h"
#include "ops/cuda/runtime.h"
#include "ops/group.h"
#include "ops/inputs.h"
#include "ops/kernel_arguments.h"
#include "ops/ops.h"

#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_sub.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

namespace momentum_bn::cuda {
namespace {

using kernels::cuda::BlendArgs;
using kernels::cuda::ForwardArgs;
using ops::MaybeTensor;
using ops::MaybeWord;
using ops::Word;

bool all_on(c10::Device device, std::initializer_list<at::Tensor> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [&](const auto& t) { return t.device() == device; });
}

/// Whether the kernels can be given this state: they read and write all of it on x's device.
bool kernels_take(const State& state, const at::Tensor& x) {
  return !state.tracks() ||
         all_on(x.device(), {state.num_batches_tracked, state.view_count, state.cur_iter, state.momentum});
}

/// Whether the kernels can read and write all of a tensor 16 bytes at a time. How they share out their sums depends on
/// it, and equal values shall give equal results wherever they lie: they are given no other tensors.
bool is_aligned(const at::Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0; }

/// The tensor as the kernels take it; undefined where there is none.
at::Tensor aligned(const MaybeTensor& tensor, at::MemoryFormat format) {
  const auto values = dense(tensor, format);
  return values.defined() && !is_aligned(values) ? values.clone() : values;
}

/// Whether the kernels can write over x.
bool can_overwrite(const at::Tensor& x) { return x.is_contiguous(x.suggest_memory_format()) && is_aligned(x); }

/// The state's tensors as the kernels take them.
class StateArrays {
 public:
  /// The state must outlive this.
  StateArrays(const State& state, at::ScalarType accumulate) : state_(state) {
    if (!state.tracks()) return;
    running_mean_ = ChannelArray(state.running_mean, accumulate);
    running_var_ = ChannelArray(state.running_var, accumulate);
    view_mean_sum_ = ChannelArray(state.view_mean_sum, accumulate);
    view_var_sum_ = ChannelArray(state.view_var_sum, accumulate);
  }

  kernels::cuda::State pointers() const {
    if (!state_.tracks()) return {};
    return {running_mean_.data(),
            running_var_.data(),
            state_.num_batches_tracked.mutable_data_ptr<int64_t>(),
            view_mean_sum_.data(),
            view_var_sum_.data(),
            state_.view_count.mutable_data_ptr<int64_t>(),
            state_.cur_iter.mutable_data_ptr<int64_t>(),
            state_.momentum.mutable_data_ptr(),
            state_.momentum.scalar_type() == at::kFloat};
  }

  void write_back() const {
    for (const auto* array : {&running_mean_, &running_var_, &view_mean_sum_, &view_var_sum_}) array->write_back();
  }

 private:
  const State& state_;
  ChannelArray running_mean_;
  ChannelArray running_var_;
  ChannelArray view_mean_sum_;
  ChannelArray view_var_sum_;
};

/// What a forward pass reads beside the statistics.
struct Inputs {
  const at::Tensor& x;
  const MaybeTensor& residual;
  const MaybeTensor& weight;
  const MaybeTensor& bias;
};

/// Launches a forward pass of x into y, which is dense in x's suggested format and may be x.
/// @param args  what is particular to it: the blend, the state, the results
void run_forward(Launch& launch, const Inputs& inputs, const at::Tensor& y, const at::Tensor& saved, ForwardArgs args) {
  const auto format = inputs.x.suggest_memory_format();
  const auto x = aligned(inputs.x, format);
  const auto residual = aligned(inputs.residual, format);
  const ChannelArray weight(inputs.weight, saved.scalar_type());
  const ChannelArray bias(inputs.bias, saved.scalar_type());
  args.type = kernel_type(x.scalar_type());
  args.shape = shape_of(x, format);
  args.x = x.const_data_ptr();
  args.residual = data_or_null(residual);
  args.y = y.data_ptr();
  args.weight = weight.data();
  args.bias = bias.data();
  args.saved = saved.data_ptr();
  args.workspace = launch.workspace(forward_workspace_bytes(args.type, args.shape, launch.device()));
  args.counters = launch.counters();
  args.stream = launch.stream();
  check(kernels::cuda::forward(args, launch.device()), "a forward kernel's launch");
}

at::Tensor batch_statistics(const at::Tensor& x) {
  check_input(x, std::nullopt);
  const auto options = x.options().dtype(at::kDouble);
  if (x.numel() == 0) return at::zeros({2 * x.size(1) + 1}, options);
  Launch launch(x);
  const auto format = x.suggest_memory_format();
  const auto dense_x = aligned(x, format);
  auto statistics = at::empty({2 * x.size(1) + 1}, options);
  kernels::cuda::StatisticsArgs args = {};
  args.type = kernel_type(x.scalar_type());
  args.shape = shape_of(dense_x, format);
  args.x = dense_x.const_data_ptr();
  args.statistics = statistics.mutable_data_ptr<double>();
  args.workspace = launch.workspace(forward_workspace_bytes(args.type, args.shape, launch.device()));
  args.counters = launch.counters();
  args.stream = launch.stream();
  check(kernels::cuda::statistics(args, launch.device()), "a statistics kernel's launch");
  return statistics;
}

/// What a training forward pass normalises x by.
struct TrainStatistics {
  /// No value at all: nothing to compute and nothing to count.
  bool empty;
  at::Tensor gathered;  // of all ranks, (ranks, 2C + 1); undefined: x alone
};

/// Checks the inputs, then asks the other processes of the group, if there is one.
TrainStatistics train_statistics(const Inputs& inputs, const State& state, const Group& processes) {
  const at::Tensor& x = inputs.x;
  const bool any = check_forward_train(x, inputs.residual, inputs.weight, inputs.bias, state, processes.has_others());
  if (!processes.has_others()) return {!any, {}};
  const auto gathered = processes.statistics(x).to(at::kDouble).contiguous();
  // With two values here there are enough in all; with fewer, the host has to know.
  if (x.numel() >= 2 * x.size(1) && x.numel() > 0) return {false, gathered};
  const auto count = gathered.select(1, 2 * x.size(1)).sum().item<double>();
  check_group_statistics(x, count);
  return {count == 0, gathered};
}

/// The forward pass of a layer: writes y and the state, returns `saved`.
at::Tensor run_train(const Inputs& inputs, const at::Tensor& y, const at::Tensor& gathered, const State& state,
                     const Config& config) {
  Launch launch(inputs.x);
  auto saved = empty_saved(inputs.x);
  const StateArrays arrays(state, saved.scalar_type());
  ForwardArgs args = {};
  args.relu = config.activation == Activation::ReLU;
  args.blend = {config.eps, config.total_iters, config.views_per_update, config.schedule == Schedule::Cosine,
                config.variance};
  args.tracks = state.tracks();
  args.state = arrays.pointers();
  args.gathered = static_cast<const double*>(data_or_null(gathered));
  args.ranks = gathered.defined() ? gathered.size(0) : 0;
  run_forward(launch, inputs, y, saved, args);
  arrays.write_back();
  return saved;
}

std::tuple<at::Tensor, at::Tensor> forward_train(const at::Tensor& x, const MaybeTensor& residual,
                                                 const MaybeTensor& weight, const MaybeTensor& bias,
                                                 at::TensorList state_tensors, double eps, int64_t total_iters,
                                                 int64_t views_per_update, Word schedule, Word variance,
                                                 MaybeWord activation, MaybeWord process_group,
                                                 const MaybeTensor& group_statistics) {
  const auto config = checked_config(eps, total_iters, views_per_update, schedule, variance, activation);
  const auto state = State::of(state_tensors);
  const Group processes(process_group, group_statistics);
  if (!kernels_take(state, x)) {
    return composite::train_forward(x, residual, weight, bias, state, config, processes);
  }
  const Inputs inputs = {x, residual, weight, bias};
  const auto statistics = train_statistics(inputs, state, processes);
  auto y = empty_output(x);
  if (statistics.empty) return {y, zero_saved(x)};
  auto saved = run_train(inputs, y, statistics.gathered, state, config);
  return {y, saved};
}

at::Tensor forward_train_(at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight,
                          const MaybeTensor& bias, at::TensorList state_tensors, double eps, int64_t total_iters,
                          int64_t views_per_update, Word schedule, Word variance, MaybeWord activation,
                          MaybeWord process_group, const MaybeTensor& group_statistics) {
  check_writable(x);
  const auto state = State::of(state_tensors);
  const bool over_x = can_overwrite(x) && !overwrites_residual(x, residual);
  if (!over_x || !kernels_take(state, x)) {
    const auto [y, saved] = forward_train(x, residual, weight, bias, state_tensors, eps, total_iters, views_per_update,
                                          schedule, variance, activation, process_group, group_statistics);
    x.copy_(y);
    return saved;
  }
  const auto config = checked_config(eps, total_iters, views_per_update, schedule, variance, activation);
  const Inputs inputs = {x, residual, weight, bias};
  const auto statistics = train_statistics(inputs, state, Group(process_group, group_statistics));
  if (statistics.empty) return zero_saved(x);
  return run_train(inputs, x, statistics.gathered, state, config);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_functional(
    const at::Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& running_mean,
    const MaybeTensor& running_var, double momentum, double eps, Word variance) {
  const auto variance_used = variance_of(variance);
  const bool any = check_forward_functional(x, weight, bias, running_mean, running_var, momentum, eps);
  auto y = empty_output(x);
  const auto options = x.options().dtype(composite::accumulate_type(x.scalar_type()));
  if (!any) return {y, at::zeros({x.size(1)}, options), at::zeros({x.size(1)}, options), zero_saved(x)};
  auto b_mean = at::empty({x.size(1)}, options);
  auto b_var = at::empty({x.size(1)}, options);
  Launch launch(x);
  auto saved = empty_saved(x);
  const ChannelArray mean(running_mean, saved.scalar_type());
  const ChannelArray var(running_var, saved.scalar_type());
  ForwardArgs args = {};
  args.blend.eps = eps;
  args.blend.variance = variance_used;
  args.tracks = mean.data() != nullptr;
  args.state.running_mean = mean.data();
  args.state.running_var = var.data();
  args.batch_mean = b_mean.data_ptr();
  args.batch_var = b_var.data_ptr();
  args.fixed_momentum = momentum;
  run_forward(launch, {x, std::nullopt, weight, bias}, y, saved, args);
  return {y, b_mean, b_var, saved};
}

/// Launches the backward pass; dx is undefined where it is not wanted, else dense like dy, or dy itself. Returns
/// dweight, dbias and dresidual.
std::tuple<at::Tensor, at::Tensor, at::Tensor> run_backward(const at::Tensor& dy, const at::Tensor& dx,
                                                            const MaybeTensor& x, const MaybeTensor& y,
                                                            const MaybeTensor& weight, const at::Tensor& saved,
                                                            MaybeWord activation, std::array<bool, 4> output_mask) {
  const bool relu = activation_of(activation) == Activation::ReLU;
  const auto sums = [&](bool wanted) { return wanted ? at::empty({dy.size(1)}, saved.options()) : at::Tensor(); };
  auto dresidual = output_mask[3] ? empty_output(dy) : at::Tensor();
  auto dweight = sums(output_mask[1]);
  auto dbias = sums(output_mask[2]);
  if (dy.numel() == 0) {
    for (const auto& sum : {dweight, dbias}) {
      if (sum.defined()) sum.zero_();
    }
  } else {
    Launch launch(dy);
    const auto format = dy.suggest_memory_format();
    const auto dense_dy = aligned(dy, format);
    const auto dense_x = output_mask[1] ? aligned(x, format) : at::Tensor();
    const auto dense_y = relu ? aligned(y, format) : at::Tensor();
    const auto dense_saved = saved.contiguous();
    const ChannelArray weights(weight, saved.scalar_type());
    const auto out = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; };
    kernels::cuda::BackwardArgs args = {};
    args.type = kernel_type(dy.scalar_type());
    args.shape = shape_of(dense_dy, format);
    args.dy = dense_dy.const_data_ptr();
    args.x = data_or_null(dense_x);
    args.y = data_or_null(dense_y);
    args.weight = weights.data();
    args.saved = dense_saved.const_data_ptr();
    args.dx = out(dx);
    args.dresidual = out(dresidual);
    args.dweight = out(dweight);
    args.dbias = out(dbias);
    args.workspace = launch.workspace(backward_workspace_bytes(args.type, args.shape, launch.device()));
    args.counters = launch.counters();
    args.stream = launch.stream();
    check(kernels::cuda::backward(args, launch.device()), "a backward kernel's launch");
  }
  return {dweight.defined() ? dweight.to(weight->scalar_type()) : dweight, dbias, dresidual};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& dy, const MaybeTensor& x,
                                                                    const MaybeTensor& y, const MaybeTensor& weight,
                                                                    const at::Tensor& saved, MaybeWord activation,
                                                                    std::array<bool, 4> output_mask) {
  const auto dx = output_mask[0] ? empty_output(dy) : at::Tensor();
  auto [dweight, dbias, dresidual] = run_backward(dy, dx, x, y, weight, saved, activation, output_mask);
  return {dx, dweight, dbias, dresidual};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_(at::Tensor& dy, const MaybeTensor& x, const MaybeTensor& y,
                                                         const MaybeTensor& weight, const at::Tensor& saved,
                                                         MaybeWord activation, std::array<bool, 4> output_mask) {
  check_writable(dy);
  const bool over_dy = can_overwrite(dy);
  const auto dx = over_dy ? dy : empty_output(dy);
  auto result = run_backward(dy, dx, x, y, weight, saved, activation, output_mask);
  if (!over_dy) dy.copy_(dx);
  return result;
}

void advance_schedule_(at::Tensor& cur_iter, at::Tensor& momentum, int64_t total_iters, Word schedule) {
  check_total_iters(total_iters);
  const auto schedule_used = schedule_of(schedule);
  if (cur_iter.device() != momentum.device()) {
    composite::advance_schedule(cur_iter, momentum, total_iters, schedule_used, {});
    return;
  }
  Launch launch(cur_iter);
  check(kernels::cuda::advance_schedule(cur_iter.mutable_data_ptr<int64_t>(), momentum.mutable_data_ptr(),
                                        momentum.scalar_type() == at::kFloat, total_iters,
                                        schedule_used == Schedule::Cosine, launch.stream()),
        "a schedule kernel's launch");
}

/// The student's parameter in the dtype of the average that it enters.
std::vector<at::Tensor> cast_like(at::TensorList student, at::TensorList averages) {
  std::vector<at::Tensor> values;
  std::vector<at::Tensor> copies;
  std::vector<at::Tensor> sources;
  for (size_t i = 0; i < student.size(); ++i) {
    if (student[i].scalar_type() == averages[i].scalar_type()) {
      values.push_back(student[i]);
      continue;
    }
    values.push_back(at::empty_like(averages[i]));
    copies.push_back(values.back());
    sources.push_back(student[i]);
  }
  if (!copies.empty()) at::_foreach_copy_(copies, sources);
  return values;
}

void teacher_update_(at::TensorList teacher, at::TensorList master, at::TensorList student, at::Tensor& updates,
                     int64_t total_iters, double param_momentum) {
  check_pairs(teacher, master, student);
  // torch has no foreach lerp whose weight is one number on the device. Below one half lerp is average + weight *
  // (value - average), a few launches for all parameters together; above, its formula is another.
  if (teacher.empty() || !(param_momentum > 0.5)) {
    composite::teacher_update(teacher, master, student, updates, total_iters, param_momentum);
    return;
  }
  const auto weight = composite::weight_of_student(updates, total_iters, param_momentum);
  std::vector<at::Tensor> averages;
  std::vector<at::Tensor> rounded;
  std::vector<at::Tensor> masters;
  for (size_t i = 0; i < teacher.size(); ++i) {
    const bool has_master = master[i].numel() > 0;
    averages.push_back(has_master ? master[i] : teacher[i]);
    if (!has_master) continue;
    rounded.push_back(teacher[i]);
    masters.push_back(master[i]);
  }
  auto differences = at::_foreach_sub(cast_like(student, averages), averages);
  at::_foreach_mul_(differences, weight.to(averages[0].scalar_type()));
  at::_foreach_add_(averages, differences);
  if (!rounded.empty()) at::_foreach_copy_(rounded, masters);
  updates.add_(1);
}

}  // namespace

TORCH_LIBRARY_IMPL(momentum_bn, CUDA, m) {
  m.impl("_batch_statistics", batch_statistics);
  m.impl("_forward_train", forward_train);
  m.impl("_forward_train_", forward_train_);
  m.impl("_forward_functional", forward_functional);
  m.impl("_backward", backward);
  m.impl("_backward_", backward_);
  m.impl("_advance_schedule_", advance_schedule_);
  m.impl("_teacher_update_", teacher_update_);
}

}  // namespace momentum_bn::cuda
