// The operators that normalise on CUDA: tensors to pointers, launches, and back. The arithmetic is in kernels/cuda.
// Nothing waits for the device, but where a rank of a group has fewer than two values per channel (see composite.h).

#include "kernels/cuda/kernels.h"
#include "ops/cuda/launch.h"
#include "ops/cuda/runtime.h"
#include "ops/normalise/calls.h"
#include "ops/normalise/checks.h"
#include "ops/normalise/composite.h"
#include "ops/normalise/config.h"
#include "ops/normalise/state.h"
#include "ops/shared/checks.h"
#include "ops/shared/dtypes.h"
#include "ops/shared/group.h"
#include "ops/shared/kernel_arguments.h"
#include "ops/shared/outputs.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

namespace momentum_bn::cuda {
namespace {

using kernels::cuda::BlendArgs;
using kernels::cuda::ForwardArgs;
using ops::MaybeTensor;

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

/// Whether there are kernels for such a layer. The others run in at:: operations.
bool kernels_know(const Config& config, const State& state) {
  return config.detach_statistics && (!state.tracks() || state.has_schedule());
}

/// The state's tensors as the kernels take them.
class StateArrays {
 public:
  /// The state must outlive this.
  StateArrays(const State& state, at::ScalarType accumulate) : state_(state) {
    if (!state.tracks()) {
      return;
    }
    running_mean_ = ChannelOutput(state.running_mean, accumulate);
    running_var_ = ChannelOutput(state.running_var, accumulate);
    view_mean_sum_ = ChannelOutput(state.view_mean_sum, accumulate);
    view_var_sum_ = ChannelOutput(state.view_var_sum, accumulate);
  }

  kernels::cuda::State pointers() const {
    if (!state_.tracks()) {
      return {};
    }
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
    for (const auto* array : {&running_mean_, &running_var_, &view_mean_sum_, &view_var_sum_}) {
      array->write_back();
    }
  }

 private:
  const State& state_;
  ChannelOutput running_mean_;
  ChannelOutput running_var_;
  ChannelOutput view_mean_sum_;
  ChannelOutput view_var_sum_;
};

/// Launches a forward pass of x into y, which is dense in x's suggested format and may be x.
/// @param args  what is particular to it: the blend, the state, the results
void run_forward(Launch& launch, const TrainInputs& inputs, const at::Tensor& y, const at::Tensor& saved,
                 ForwardArgs args) {
  const auto format = inputs.x.suggest_memory_format();
  const auto x = aligned(inputs.x, format);
  const auto residual = aligned(inputs.residual, format);
  const ChannelInput weight(inputs.weight, saved.scalar_type());
  const ChannelInput bias(inputs.bias, saved.scalar_type());
  // Asked for first: a copy-on-write x that is overwritten gets memory of its own by it.
  args.y = y.mutable_data_ptr();
  args.type = kernel_type(x.scalar_type());
  args.shape = shape_of(x, format);
  args.x = x.const_data_ptr();
  args.residual = data_or_null(residual);
  args.weight = weight.data();
  args.bias = bias.data();
  args.saved = saved.mutable_data_ptr();
  args.workspace = launch.workspace(forward_workspace_bytes(args.type, args.shape, launch.device()));
  args.counters = launch.counters();
  args.stream = launch.stream();
  check(kernels::cuda::forward(args, launch.device()), "a forward kernel's launch");
}

at::Tensor batch_statistics(const ops::BatchStatistics& call) {
  const at::Tensor& x = call.x;
  check_input(x, std::nullopt);
  const auto options = x.options().dtype(at::kDouble);
  if (x.numel() == 0) {
    return at::zeros({2 * x.size(1) + 1}, options);
  }
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
TrainStatistics train_statistics(const TrainInputs& inputs, const State& state, const Group& processes) {
  const at::Tensor& x = inputs.x;
  const bool any = check_forward_train(inputs, state, processes.has_others());
  if (!processes.has_others()) {
    return {!any, {}};
  }
  const auto gathered = processes.statistics(x).to(at::kDouble).contiguous();
  // With two values here there are enough in all; with fewer, the host has to know.
  if (x.numel() >= 2 * x.size(1) && x.numel() > 0) {
    return {false, gathered};
  }
  const auto count = gathered.select(1, 2 * x.size(1)).sum().item<double>();
  check_group_statistics(x, count);
  return {count == 0, gathered};
}

/// The forward pass of a layer: writes y and the state, returns `saved`.
at::Tensor run_train(const TrainInputs& inputs, const at::Tensor& y, const at::Tensor& gathered, const State& state,
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

std::tuple<at::Tensor, at::Tensor> forward_train(const ops::ForwardTrain& call) {
  const auto config = checked_config(call);
  const auto state = State::of(call.state);
  if (!kernels_know(config, state)) {
    return composite::forward_train(call);
  }
  const auto inputs = inputs_of(call);
  const auto statistics = train_statistics(inputs, state, Group(call.process_group, call.group_statistics));
  auto y = empty_output(call.x);
  if (statistics.empty) {
    return {y, zero_saved(call.x)};
  }
  auto saved = run_train(inputs, y, statistics.gathered, state, config);
  return {y, saved};
}

at::Tensor forward_train_(const ops::ForwardTrainInplace& call) {
  check_writable(call.x);
  const auto config = checked_config(call);
  const auto state = State::of(call.state);
  const bool over_x = can_overwrite(call.x) && !overwrites_residual(call.x, call.residual);
  if (!over_x || !kernels_know(config, state)) {
    const auto [y, saved] = forward_train(ops::as<ops::ForwardTrain>(call));
    call.x.copy_(y);
    return saved;
  }
  const auto inputs = inputs_of(call);
  const auto statistics = train_statistics(inputs, state, Group(call.process_group, call.group_statistics));
  if (statistics.empty) {
    return zero_saved(call.x);
  }
  return run_train(inputs, call.x, statistics.gathered, state, config);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_functional(const ops::ForwardFunctional& call) {
  const at::Tensor& x = call.x;
  const auto variance_used = variance_of(call.variance);
  const bool any = check_forward_functional(call);
  auto y = empty_output(x);
  const auto options = x.options().dtype(accumulate_type(x.scalar_type()));
  if (!any) {
    return {y, at::zeros({x.size(1)}, options), at::zeros({x.size(1)}, options), zero_saved(x)};
  }
  auto b_mean = at::empty({x.size(1)}, options);
  auto b_var = at::empty({x.size(1)}, options);
  Launch launch(x);
  auto saved = empty_saved(x);
  const ChannelInput mean(call.running_mean, saved.scalar_type());
  const ChannelInput var(call.running_var, saved.scalar_type());
  ForwardArgs args = {};
  args.blend.eps = call.eps;
  args.blend.variance = variance_used;
  args.tracks = mean.data() != nullptr;
  // They are only read where the batch's own statistics are asked for.
  args.state.running_mean = const_cast<void*>(mean.data());
  args.state.running_var = const_cast<void*>(var.data());
  args.batch_mean = b_mean.mutable_data_ptr();
  args.batch_var = b_var.mutable_data_ptr();
  args.fixed_momentum = call.momentum;
  const MaybeTensor none;
  run_forward(launch, {x, none, call.weight, call.bias}, y, saved, args);
  return {y, b_mean, b_var, saved};
}

/// dweight, dbias and dresidual.
using ParameterGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

/// Launches the backward pass; dx is undefined where it is not wanted, else dense like dy, or dy itself.
template <typename Backward>
ParameterGradients run_backward(const Backward& call, const at::Tensor& dx) {
  const at::Tensor& dy = call.dy;
  const bool relu = activation_of(call.activation) == Activation::ReLU;
  check_backward(call, relu);
  const auto sums = [&](bool wanted) {
    return wanted ? empty_per_channel(dy, call.saved.scalar_type()) : at::Tensor();
  };
  auto dresidual = call.output_mask[3] ? empty_output(dy) : at::Tensor();
  auto dweight = sums(call.output_mask[1]);
  auto dbias = sums(call.output_mask[2]);
  if (dy.numel() == 0) {
    zero_where_defined({dweight, dbias});
  } else {
    Launch launch(dy);
    const auto format = dy.suggest_memory_format();
    const auto dense_dy = aligned(dy, format);
    const auto dense_x = call.output_mask[1] ? aligned(call.x, format) : at::Tensor();
    const auto dense_y = relu ? aligned(call.y, format) : at::Tensor();
    const auto saved = call.saved.contiguous();
    const ChannelInput weight(call.weight, saved.scalar_type());
    kernels::cuda::BackwardArgs args = {};
    args.dx = mutable_data_or_null(dx);  // first, as above
    args.type = kernel_type(dy.scalar_type());
    args.shape = shape_of(dense_dy, format);
    args.dy = dense_dy.const_data_ptr();
    args.x = data_or_null(dense_x);
    args.y = data_or_null(dense_y);
    args.weight = weight.data();
    args.saved = saved.const_data_ptr();
    args.dresidual = mutable_data_or_null(dresidual);
    args.dweight = mutable_data_or_null(dweight);
    args.dbias = mutable_data_or_null(dbias);
    args.workspace = launch.workspace(backward_workspace_bytes(args.type, args.shape, launch.device()));
    args.counters = launch.counters();
    args.stream = launch.stream();
    check(kernels::cuda::backward(args, launch.device()), "a backward kernel's launch");
  }
  return {dweight.defined() ? dweight.to(call.weight->scalar_type()) : dweight, dbias, dresidual};
}

/// Whether there are kernels for such a backward pass: constant statistics, and the mask, if any, from y.
template <typename Backward>
bool kernels_know_backward(const Backward& call) {
  const bool has_mask = !call.activation || (call.y && call.y->defined());
  return has_mask && !is_through_statistics(call.saved);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(const ops::Backward& call) {
  if (!kernels_know_backward(call)) {
    return composite::backward(call);
  }
  const auto dx = call.output_mask[0] ? empty_output(call.dy) : at::Tensor();
  auto [dweight, dbias, dresidual] = run_backward(call, dx);
  return {dx, dweight, dbias, dresidual};
}

ParameterGradients backward_(const ops::BackwardInplace& call) {
  check_writable(call.dy);
  if (!can_overwrite(call.dy) || !kernels_know_backward(call)) {
    auto fresh = ops::as<ops::Backward>(call);
    fresh.output_mask[0] = true;
    auto [dx, dweight, dbias, dresidual] = backward(fresh);
    call.dy.copy_(dx);
    return {dweight, dbias, dresidual};
  }
  return run_backward(call, call.dy);
}

void advance_schedule_(const ops::AdvanceSchedule& call) {
  check_schedule(call.cur_iter, call.momentum);
  check_total_iters(call.total_iters);
  const bool cosine = schedule_of(call.schedule) == Schedule::Cosine;
  Launch launch(call.cur_iter);
  check(kernels::cuda::advance_schedule(call.cur_iter.mutable_data_ptr<int64_t>(), call.momentum.mutable_data_ptr(),
                                        call.momentum.scalar_type() == at::kFloat, call.total_iters, cosine,
                                        launch.stream()),
        "a schedule kernel's launch");
}

}  // namespace

TORCH_LIBRARY_IMPL(momentum_bn, CUDA, m) {
  ops::implement<batch_statistics>(m);
  ops::implement<forward_train>(m);
  ops::implement<forward_train_>(m);
  ops::implement<forward_functional>(m);
  ops::implement<backward>(m);
  ops::implement<backward_>(m);
  ops::implement<advance_schedule_>(m);
}

}  // namespace momentum_bn::cuda
