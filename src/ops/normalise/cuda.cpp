// The operators that normalise on CUDA: tensors to pointers, launches, and back. The arithmetic is in kernels/cuda.
// Nothing waits for the device, but where a rank of a group has fewer than two values per channel: it must know whether
// the others have any.

#include "kernels/cuda/kernels.h"
#include "ops/cuda/driver.h"
#include "ops/cuda/launch.h"
#include "ops/cuda/runtime.h"
#include "ops/normalise/calls.h"
#include "ops/normalise/inputs.h"
#include "ops/normalise/options.h"
#include "ops/shared/group.h"
#include "ops/shared/kernel_tensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

namespace momentum_bn::cuda {
namespace {

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
    if (!state.has_schedule()) {
      return;
    }
    view_mean_sum_ = ChannelOutput(state.view_mean_sum, accumulate);
    view_var_sum_ = ChannelOutput(state.view_var_sum, accumulate);
  }

  kernels::cuda::State pointers() const {
    if (!state_.tracks()) {
      return {};
    }
    kernels::cuda::State result = {};
    result.running_mean = running_mean_.data();
    result.running_var = running_var_.data();
    result.num_batches_tracked = state_.num_batches_tracked.mutable_data_ptr<int64_t>();
    if (!state_.has_schedule()) {
      return result;
    }
    result.view_mean_sum = view_mean_sum_.data();
    result.view_var_sum = view_var_sum_.data();
    result.view_count = state_.view_count.mutable_data_ptr<int64_t>();
    result.cur_iter = state_.cur_iter.mutable_data_ptr<int64_t>();
    result.momentum = state_.momentum.mutable_data_ptr();
    result.momentum_is_float = state_.momentum.scalar_type() == at::kFloat;
    return result;
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
                     const ops::Options& options) {
  Launch launch(inputs.x);
  auto saved = empty_saved(inputs.x, options.detach_statistics);
  const StateArrays arrays(state, saved.scalar_type());
  ForwardArgs args = {};
  args.relu = is_relu(options.activation);
  args.options = blend_options_of(options);
  args.tracks = state.tracks();
  args.state = arrays.pointers();
  args.momentum = options.momentum.value_or(-1);
  args.through_statistics = !options.detach_statistics;
  args.gathered = static_cast<const double*>(data_or_null(gathered));
  args.ranks = gathered.defined() ? gathered.size(0) : 0;
  run_forward(launch, inputs, y, saved, args);
  arrays.write_back();
  return saved;
}

std::tuple<at::Tensor, at::Tensor> forward_train(const ops::ForwardTrain& call) {
  check_options(call.options);
  const auto state = State::of(call.state);
  const auto inputs = inputs_of(call);
  const auto statistics = train_statistics(inputs, state, Group(call.process_group, call.group_statistics));
  auto y = empty_output(call.x);
  if (statistics.empty) {
    return {y, zero_saved(call.x, call.options.detach_statistics)};
  }
  auto saved = run_train(inputs, y, statistics.gathered, state, call.options);
  return {y, saved};
}

at::Tensor forward_train_(const ops::ForwardTrainInplace& call) {
  check_writable(call.x, "x");
  if (!can_overwrite(call.x) || overwrites_residual(call.x, call.residual)) {
    const auto [y, saved] = forward_train(ops::as<ops::ForwardTrain>(call));
    call.x.copy_(y);
    return saved;
  }
  check_options(call.options);
  const auto state = State::of(call.state);
  const auto inputs = inputs_of(call);
  const auto statistics = train_statistics(inputs, state, Group(call.process_group, call.group_statistics));
  if (statistics.empty) {
    return zero_saved(call.x, call.options.detach_statistics);
  }
  return run_train(inputs, call.x, statistics.gathered, state, call.options);
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
  args.options.eps = call.eps;
  args.options.variance = variance_used;
  args.tracks = mean.data() != nullptr;
  // They are only read where the batch's own statistics are asked for.
  args.state.running_mean = const_cast<void*>(mean.data());
  args.state.running_var = const_cast<void*>(var.data());
  args.batch_mean = b_mean.mutable_data_ptr();
  args.batch_var = b_var.mutable_data_ptr();
  args.momentum = call.momentum;
  const MaybeTensor none;
  run_forward(launch, {x, none, call.weight, call.bias}, y, saved, args);
  return {y, b_mean, b_var, saved};
}

/// Tensors of a backward pass as the kernels take them, and arrays; they must outlive its launches.
class BackwardTensors {
 public:
  /// @param call  any backward pass's arguments
  /// @param dx    where it is written: undefined, or dense like dy, or dy itself
  template <typename Backward>
  BackwardTensors(const Backward& call, bool relu, const at::Tensor& dx)
      : format_(call.dy.suggest_memory_format()),
        dy_(aligned(call.dy, format_)),
        y_(relu ? aligned(call.y, format_) : at::Tensor()),
        saved_(call.saved.contiguous()),
        weight_(call.weight, saved_.scalar_type()),
        bias_(call.bias, saved_.scalar_type()) {
    // Asked for first: a copy-on-write dy that is overwritten gets memory of its own by it.
    args_.dx = mutable_data_or_null(dx);
    args_.type = kernel_type(dy_.scalar_type());
    args_.shape = shape_of(dy_, format_);
    args_.dy = dy_.const_data_ptr();
    args_.relu = relu;
    args_.y = data_or_null(y_);
    args_.weight = weight_.data();
    args_.bias = bias_.data();
    args_.saved = saved_.const_data_ptr();
    args_.through_statistics = is_through_statistics(saved_);
  }

  void use_x(const MaybeTensor& x) {
    x_ = aligned(x, format_);
    args_.x = data_or_null(x_);
  }

  kernels::cuda::BackwardArgs& args() { return args_; }

  /// @param run  the kernels' entry
  void launch(int (*run)(const kernels::cuda::BackwardArgs&, const kernels::cuda::Device&)) {
    Launch launch(dy_);
    args_.workspace = launch.workspace(backward_workspace_bytes(args_.type, args_.shape, launch.device()));
    args_.counters = launch.counters();
    args_.stream = launch.stream();
    check(run(args_, launch.device()), "a backward kernel's launch");
  }

 private:
  at::MemoryFormat format_;
  at::Tensor dy_;
  at::Tensor x_;
  at::Tensor y_;
  at::Tensor saved_;
  ChannelInput weight_;
  ChannelInput bias_;
  kernels::cuda::BackwardArgs args_ = {};
};

/// dweight, dbias and dresidual.
using ParameterGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

/// Launches a backward pass. Where dy has no values the sums are 0.
/// @param dx    where it is written: undefined, or dense like dy, or dy itself
/// @param sums  undefined, or (2, C) doubles to be written
/// @param run   the kernels' entry
template <typename Backward>
ParameterGradients run_backward(const Backward& call, bool relu, const at::Tensor& dx, const at::Tensor& sums,
                                int (*run)(const kernels::cuda::BackwardArgs&, const kernels::cuda::Device&)) {
  const at::Tensor& dy = call.dy;
  const auto per_channel = [&](bool wanted) {
    return wanted ? empty_per_channel(dy, call.saved.scalar_type()) : at::Tensor();
  };
  auto dresidual = call.output_mask[3] ? empty_output(dy) : at::Tensor();
  auto dweight = per_channel(call.output_mask[1]);
  auto dbias = per_channel(call.output_mask[2]);
  if (dy.numel() == 0) {
    zero_where_defined({dweight, dbias, sums});
  } else {
    BackwardTensors tensors(call, relu, dx);
    auto& args = tensors.args();
    if (call.output_mask[1] || (relu && !args.y) || sums.defined() || (dx.defined() && args.through_statistics)) {
      tensors.use_x(call.x);
    }
    args.dresidual = mutable_data_or_null(dresidual);
    args.dweight = mutable_data_or_null(dweight);
    args.dbias = mutable_data_or_null(dbias);
    args.sums = sums.defined() ? sums.mutable_data_ptr<double>() : nullptr;
    tensors.launch(run);
  }
  if (dweight.defined() && call.weight) {
    dweight = dweight.to(call.weight->scalar_type());
  }
  return {dweight, dbias, dresidual};
}

template <typename Backward>
ParameterGradients whole_backward(const Backward& call, const at::Tensor& dx) {
  const bool relu = is_relu(call.activation);
  check_backward(call, relu);
  return run_backward(call, relu, dx, /*sums=*/{}, kernels::cuda::backward);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(const ops::Backward& call) {
  const auto dx = call.output_mask[0] ? empty_output(call.dy) : at::Tensor();
  auto [dweight, dbias, dresidual] = whole_backward(call, dx);
  return {dx, dweight, dbias, dresidual};
}

ParameterGradients backward_(const ops::BackwardInplace& call) {
  check_writable(call.dy, "dy");
  if (can_overwrite(call.dy)) {
    return whole_backward(call, call.dy);
  }
  const auto dx = empty_output(call.dy);
  auto gradients = whole_backward(call, dx);
  call.dy.copy_(dx);
  return gradients;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gradient_sums(const ops::GradientSums& call) {
  const bool relu = is_relu(call.activation);
  check_gradient_sums(call, relu);
  auto sums = at::empty({2, call.dy.size(1)}, call.dy.options().dtype(at::kDouble));
  auto [dweight, dbias, dresidual] = run_backward(call, relu, /*dx=*/{}, sums, kernels::cuda::gradient_sums);
  return {sums, dweight, dbias, dresidual};
}

at::Tensor gradient_of_input(const ops::GradientOfInput& call) {
  const bool relu = is_relu(call.activation);
  check_gradient_of_input(call, relu);
  auto dx = empty_output(call.dy);
  if (call.dy.numel() == 0) {
    return dx;
  }
  const auto sums = call.sums.contiguous();
  BackwardTensors tensors(call, relu, dx);
  tensors.use_x(call.x);
  // They are only read here.
  tensors.args().sums = const_cast<double*>(sums.const_data_ptr<double>());
  tensors.launch(kernels::cuda::gradient_of_input);
  return dx;
}

void advance_schedule_(const ops::AdvanceSchedule& call) {
  check_advance_schedule(call);
  const bool cosine = schedule_of(call.schedule) == Schedule::Cosine;
  Launch launch(call.cur_iter);
  check(kernels::cuda::advance_schedule(call.cur_iter.mutable_data_ptr<int64_t>(), call.momentum.mutable_data_ptr(),
                                        call.momentum.scalar_type() == at::kFloat, call.total_iters, cosine,
                                        launch.stream()),
        "a schedule kernel's launch");
}

/// @throws c10::ValueError on another word
void use_cuda_paths(ops::Word paths) {
  using kernels::cuda::Paths;
  const bool on_chip = paths == "on_chip";
  const bool several = paths == "several_launches";
  TORCH_CHECK_VALUE(on_chip || several || paths == "best",
                    "paths must be 'best', 'on_chip' or 'several_launches' (got '", paths, "')");
  kernels::cuda::use_paths(on_chip ? Paths::kOnChip : several ? Paths::kSeveralLaunches : Paths::kBest);
}

std::tuple<int64_t, int64_t> cuda_path_counts() {
  const auto counts = kernels::cuda::path_counts();
  return {counts.on_chip, counts.several_launches};
}

}  // namespace

// For tests: the ways that passes of this process may go from now on, and how many went each.
TORCH_LIBRARY_FRAGMENT(momentum_bn, m) {
  m.def("_use_cuda_paths(str paths) -> ()", use_cuda_paths);
  m.def("_cuda_path_counts() -> (int on_chip, int several_launches)", cuda_path_counts);
}

TORCH_LIBRARY_IMPL(momentum_bn, CUDA, m) {
  if (!driver_suits()) {
    return;  // the composite path is taken
  }
  ops::implement<batch_statistics, forward_train, forward_train_, forward_functional, backward, backward_,
                 gradient_sums, gradient_of_input, advance_schedule_>(m);
}

}  // namespace momentum_bn::cuda
