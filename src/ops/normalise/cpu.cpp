// The operators that normalise on the CPU: tensors to pointers, state to numbers, and back. The arithmetic on values is
// in kernels/cpu.

#include "kernels/channel_rules.h"
#include "kernels/cpu/dispatch.h"
#include "ops/cpu/kept_memory.h"
#include "ops/cpu/parallel_for.h"
#include "ops/normalise/calls.h"
#include "ops/normalise/inputs.h"
#include "ops/normalise/options.h"
#include "ops/shared/group.h"
#include "ops/shared/kernel_tensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

namespace momentum_bn::cpu {
namespace {

using kernels::BlendArgs;
using ops::MaybeTensor;

double read_momentum(const at::Tensor& momentum) {
  return momentum.scalar_type() == at::kDouble ? *momentum.const_data_ptr<double>()
                                               : static_cast<double>(*momentum.const_data_ptr<float>());
}

void write_momentum(const at::Tensor& momentum, double value) {
  if (momentum.scalar_type() == at::kDouble) {
    *momentum.mutable_data_ptr<double>() = value;
  } else {
    *momentum.mutable_data_ptr<float>() = static_cast<float>(value);
  }
}

int64_t read_count(const at::Tensor& count) { return *count.const_data_ptr<int64_t>(); }
void write_count(const at::Tensor& count, int64_t value) { *count.mutable_data_ptr<int64_t>() = value; }

void advance_schedule(const at::Tensor& cur_iter, const at::Tensor& momentum, int64_t total_iters, ops::Word schedule) {
  const int64_t next = read_count(cur_iter) + 1;
  write_count(cur_iter, next);
  if (schedule_of(schedule) == Schedule::Cosine && read_momentum(momentum) >= 0) {
    write_momentum(momentum, kernels::cosine_momentum(next, total_iters));
  }
}

/// The statistics of a group's values together, as kernels take them.
struct GroupMoments {
  std::vector<double> mean;
  std::vector<double> m2;
  double count = 0;

  /// Merges the ranks in their order, so that all of them get the same bits.
  /// @param all  (ranks, 2C + 1), see `_batch_statistics` in schemas.cpp
  explicit GroupMoments(const at::Tensor& all) {
    const auto rows = all.to(at::kDouble).contiguous();
    const int64_t channels = (rows.size(1) - 1) / 2;
    for (int64_t c = 0; c < channels; ++c) {
      kernels::BatchMoments merged = {0, 0, 0};
      for (int64_t rank = 0; rank < rows.size(0); ++rank) {
        const double* row = rows.const_data_ptr<double>() + rank * rows.size(1);
        kernels::merge(merged, {row[c], row[channels + c], row[2 * channels]});
      }
      mean.push_back(merged.mean);
      m2.push_back(merged.m2);
      count = merged.count;
    }
  }
};

/// The state as a forward pass sees it: arrays and numbers at its beginning, and what becomes of it at its end.
class StateUpdate {
 public:
  /// The state and the options must outlive this.
  StateUpdate(const State& state, const ops::Options& options, at::ScalarType accumulate)
      : state_(state), options_(options) {
    if (!state.tracks()) {
      return;
    }
    running_mean_ = ChannelOutput(state.running_mean, accumulate);
    running_var_ = ChannelOutput(state.running_var, accumulate);
    view_mean_sum_ = ChannelOutput(state.view_mean_sum, accumulate);
    view_var_sum_ = ChannelOutput(state.view_var_sum, accumulate);
  }

  void fill(BlendArgs& args) const {
    args.batch_weight = 1;
    if (!state_.tracks()) {
      return;
    }
    args.running_mean = running_mean_.data();
    args.running_var = running_var_.data();
    args.view_mean_sum = view_mean_sum_.data();
    args.view_var_sum = view_var_sum_.data();
    args.update_weight = update_weight();
    if (state_.has_schedule()) {
      args.batch_weight = args.update_weight;
    }
    args.views = static_cast<double>(views());
    args.completes_update = completes_update();
  }

  /// Counts the forward. It is called when all channels are done.
  void finish() const {
    if (!state_.tracks()) {
      return;
    }
    for (const auto* array : {&running_mean_, &running_var_, &view_mean_sum_, &view_var_sum_}) {
      array->write_back();
    }
    write_count(state_.num_batches_tracked, read_count(state_.num_batches_tracked) + 1);
    if (!state_.has_schedule()) {
      return;
    }
    const bool complete = completes_update();
    write_count(state_.view_count, complete ? 0 : views());
    if (complete) {
      advance_schedule(state_.cur_iter, state_.momentum, options_.total_iters, options_.schedule);
    }
  }

 private:
  /// The number of views in the update, this one counted.
  int64_t views() const { return state_.has_schedule() ? read_count(state_.view_count) + 1 : 1; }
  bool completes_update() const { return !state_.has_schedule() || views() >= options_.views_per_update; }

  double update_weight() const {
    if (!state_.has_schedule()) {
      return options_.momentum ? *options_.momentum
                               : 1.0 / static_cast<double>(read_count(state_.num_batches_tracked) + 1);
    }
    const double momentum = read_momentum(state_.momentum);
    return momentum >= 0 ? momentum : 1.0 / static_cast<double>(read_count(state_.cur_iter) + 1);
  }

  const State& state_;
  const ops::Options& options_;
  ChannelOutput running_mean_;
  ChannelOutput running_var_;
  ChannelOutput view_mean_sum_;
  ChannelOutput view_var_sum_;
};

/// What one forward pass is given beside its tensors.
struct Pass {
  const BlendArgs& blend;
  bool relu;
  const GroupMoments* group;  // or null: x normalises itself by itself
};

/// Runs the forward kernels on x into y, which is dense in `format` and may be x.
/// @param warm  see FreshOutput
void run_forward(const TrainInputs& inputs, const at::Tensor& y, bool warm, at::MemoryFormat format,
                 const at::Tensor& saved, const Pass& pass) {
  const auto x = inputs.x.contiguous(format);
  const auto residual = dense(inputs.residual, format);
  const ChannelInput weight(inputs.weight, saved.scalar_type());
  const ChannelInput bias(inputs.bias, saved.scalar_type());
  kernels::ForwardArgs args = {};
  // Asked for first: a copy-on-write x that is overwritten gets memory of its own by it.
  args.y = y.mutable_data_ptr();
  args.type = kernel_type(x.scalar_type());
  args.shape = shape_of(x, format);
  args.x = x.const_data_ptr();
  args.residual = data_or_null(residual);
  args.relu = pass.relu;
  args.stream = warm;
  args.weight = weight.data();
  args.bias = bias.data();
  args.saved = saved.mutable_data_ptr();
  args.saved_rows = static_cast<int>(saved.size(0));
  args.blend = &pass.blend;
  if (pass.group) {
    // They are only read where they are given.
    args.mean = const_cast<double*>(pass.group->mean.data());
    args.m2 = const_cast<double*>(pass.group->m2.data());
    args.statistics_given = true;
  }
  args.parallel_for = parallel_for;
  kernels::table().forward(args);
}

/// The same where x is to hold the result, whatever its strides.
void run_forward_inplace(const TrainInputs& inputs, const at::Tensor& saved, const Pass& pass) {
  const at::Tensor& x = inputs.x;
  const auto format = x.suggest_memory_format();
  if (x.is_contiguous(format) && !overwrites_residual(x, inputs.residual)) {
    return run_forward(inputs, x, /*warm=*/false, format, saved, pass);
  }
  const auto y = fresh_output(x);
  run_forward(inputs, y.tensor, y.warm, format, saved, pass);
  x.copy_(y.tensor);
}

/// A training forward without its output: what normalises x, and what becomes of the state.
class Training {
 public:
  /// Checks the inputs, then asks the other processes of the group, if there is one.
  template <typename Train>
  explicit Training(const Train& call)
      : inputs_(inputs_of(call)), options_(call.options), state_(State::of(call.state)) {
    check_options(options_);
    const Group processes(call.process_group, call.group_statistics);
    const bool any = check_forward_train(inputs_, state_, processes.has_others());
    count_ = any && !processes.has_others() ? values_per_channel(inputs_.x) : 0;
    if (processes.has_others()) {
      group_.emplace(processes.statistics(inputs_.x));
      check_group_statistics(inputs_.x, group_->count);
      count_ = group_->count;
    }
  }

  /// @param normalise  a function of the Pass that writes y
  /// @return `saved`
  template <typename Normalise>
  at::Tensor run(const Normalise& normalise) const {
    if (count_ == 0) {  // no value at all: nothing to compute and nothing to count
      return zero_saved(inputs_.x, options_.detach_statistics);
    }
    auto saved = empty_saved(inputs_.x, options_.detach_statistics);
    const StateUpdate update(state_, options_, saved.scalar_type());
    BlendArgs blend = {};
    blend.values_per_channel = count_;
    blend.options = blend_options_of(options_);
    update.fill(blend);
    normalise(saved, Pass{blend, is_relu(options_.activation), group_ ? &*group_ : nullptr});
    update.finish();
    return saved;
  }

  const TrainInputs& inputs() const { return inputs_; }

 private:
  TrainInputs inputs_;
  ops::Options options_;
  State state_;
  std::optional<GroupMoments> group_;
  double count_;
};

std::tuple<at::Tensor, at::Tensor> forward_train(const ops::ForwardTrain& call) {
  const Training training(call);
  const auto y = fresh_output(call.x);
  auto saved = training.run([&](const at::Tensor& saved_statistics, const Pass& pass) {
    run_forward(training.inputs(), y.tensor, y.warm, call.x.suggest_memory_format(), saved_statistics, pass);
  });
  return {y.tensor, saved};
}

at::Tensor forward_train_(const ops::ForwardTrainInplace& call) {
  check_writable(call.x, "x");
  const Training training(call);
  return training.run([&](const at::Tensor& saved_statistics, const Pass& pass) {
    run_forward_inplace(training.inputs(), saved_statistics, pass);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_functional(const ops::ForwardFunctional& call) {
  const at::Tensor& x = call.x;
  BlendArgs blend = {};
  blend.options.variance = variance_of(call.variance);
  const bool any = check_forward_functional(call);
  const auto y = fresh_output(x);
  const auto options = x.options().dtype(accumulate_type(x.scalar_type()));
  auto b_mean = at::zeros({x.size(1)}, options);
  auto b_var = at::zeros({x.size(1)}, options);
  if (!any) {
    return {y.tensor, b_mean, b_var, zero_saved(x)};
  }
  auto saved = empty_saved(x);
  const ChannelInput running_mean(call.running_mean, saved.scalar_type());
  const ChannelInput running_var(call.running_var, saved.scalar_type());
  blend.values_per_channel = values_per_channel(x);
  blend.options.eps = call.eps;
  blend.batch_weight = running_mean.data() ? call.momentum : 1;
  // Without an update they are only read.
  blend.running_mean = const_cast<void*>(running_mean.data());
  blend.running_var = const_cast<void*>(running_var.data());
  blend.batch_mean = b_mean.mutable_data_ptr();
  blend.batch_var = b_var.mutable_data_ptr();
  const MaybeTensor none;
  run_forward({x, none, call.weight, call.bias}, y.tensor, y.warm, x.suggest_memory_format(), saved,
              {blend, /*relu=*/false, /*group=*/nullptr});
  return {y.tensor, b_mean, b_var, saved};
}

/// What this process tells the others of its batch, which may be empty: see schemas.cpp.
at::Tensor batch_statistics(const ops::BatchStatistics& call) {
  const at::Tensor& x = call.x;
  check_input(x, std::nullopt);
  const int64_t channels = x.size(1);
  auto statistics = at::zeros({2 * channels + 1}, x.options().dtype(at::kDouble));
  if (x.numel() == 0) {
    return statistics;
  }
  const auto format = x.suggest_memory_format();
  const auto dense_x = x.contiguous(format);
  kernels::StatisticsArgs args = {};
  args.type = kernel_type(x.scalar_type());
  args.shape = shape_of(dense_x, format);
  args.x = dense_x.const_data_ptr();
  args.mean = statistics.mutable_data_ptr<double>();
  args.m2 = args.mean + channels;
  args.parallel_for = parallel_for;
  kernels::table().statistics(args);
  args.m2[channels] = values_per_channel(x);
  return statistics;
}

/// Tensors of a backward pass, dense, and arrays; both must outlive the kernels' run.
class BackwardTensors {
 public:
  template <typename Backward>
  BackwardTensors(const Backward& call, bool relu)
      : format_(call.dy.suggest_memory_format()),
        dy_(call.dy.contiguous(format_)),
        y_(relu ? dense(call.y, format_) : at::Tensor()),
        saved_(call.saved.contiguous()),
        weight_(call.weight, saved_.scalar_type()),
        bias_(call.bias, saved_.scalar_type()) {
    args_.type = kernel_type(dy_.scalar_type());
    args_.shape = shape_of(dy_, format_);
    args_.relu = relu;
    args_.y = data_or_null(y_);
    args_.saved = saved_.const_data_ptr();
    args_.weight = weight_.data();
    args_.bias = bias_.data();
    args_.parallel_for = parallel_for;
  }

  void use_x(const MaybeTensor& x) {
    x_ = dense(x, format_);
    args_.x = data_or_null(x_);
  }

  /// dx is undefined where it is not wanted, else dense like dy, or dy itself.
  void write_to(const FreshOutput& dx, const FreshOutput& dresidual) {
    // Asked for first: a copy-on-write dy that is overwritten gets memory of its own by it.
    args_.dx = mutable_data_or_null(dx.tensor);
    args_.dresidual = mutable_data_or_null(dresidual.tensor);
    args_.stream = dx.warm && dresidual.warm;
    args_.dy = dy_.const_data_ptr();
  }

  kernels::BackwardArgs& args() { return args_; }
  at::ScalarType accumulate() const { return saved_.scalar_type(); }

 private:
  at::MemoryFormat format_;
  at::Tensor dy_;
  at::Tensor x_;
  at::Tensor y_;
  at::Tensor saved_;
  ChannelInput weight_;
  ChannelInput bias_;
  kernels::BackwardArgs args_ = {};
};

const FreshOutput kNotWanted = {at::Tensor(), /*warm=*/true};

/// dweight, dbias and dresidual.
using ParameterGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

/// Runs backward kernels. Where dy has no values the sums are 0.
/// @param dx    where it is written: undefined, or dense like dy, or dy itself
/// @param sums  undefined, or (2, C) doubles to be written
/// @param run   the kernels' entry
template <typename Backward>
ParameterGradients run_backward(const Backward& call, bool relu, const FreshOutput& dx, const at::Tensor& sums,
                                void (*run)(const kernels::BackwardArgs&)) {
  const at::Tensor& dy = call.dy;
  const FreshOutput dresidual =
      call.output_mask[3] ? fresh_output(dy) : FreshOutput{at::Tensor(), !dx.tensor.defined() || dx.warm};
  auto dweight = call.output_mask[1] ? at::empty({dy.size(1)}, call.weight->options()) : at::Tensor();
  auto dbias = call.output_mask[2] ? at::empty({dy.size(1)}, call.saved.options()) : at::Tensor();
  if (dy.numel() == 0) {
    zero_where_defined({dweight, dbias, sums});
    return {dweight, dbias, dresidual.tensor};
  }
  BackwardTensors tensors(call, relu);
  auto& args = tensors.args();
  const bool mask_from_x = relu && args.y == nullptr;
  if (call.output_mask[1] || mask_from_x || sums.defined() || is_through_statistics(call.saved)) {
    tensors.use_x(call.x);
  }
  tensors.write_to(dx, dresidual);
  const ChannelOutput dweight_array(dweight, tensors.accumulate());
  const ChannelOutput dbias_array(dbias, tensors.accumulate());
  args.dweight = dweight_array.data();
  args.dbias = dbias_array.data();
  args.sums = sums.defined() ? sums.mutable_data_ptr<double>() : nullptr;
  run(args);
  dweight_array.write_back();
  dbias_array.write_back();
  return {dweight, dbias, dresidual.tensor};
}

/// The kernels' entry for a whole backward pass: through the statistics where dx is wanted, and they are not constant.
template <typename Backward>
ParameterGradients whole_backward(const Backward& call, const FreshOutput& dx) {
  const bool relu = is_relu(call.activation);
  check_backward(call, relu);
  const bool through = dx.tensor.defined() && is_through_statistics(call.saved);
  return run_backward(call, relu, dx, /*sums=*/{},
                      through ? kernels::table().backward_through_statistics : kernels::table().backward);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(const ops::Backward& call) {
  const FreshOutput dx = call.output_mask[0] ? fresh_output(call.dy) : kNotWanted;
  auto [dweight, dbias, dresidual] = whole_backward(call, dx);
  return {dx.tensor, dweight, dbias, dresidual};
}

ParameterGradients backward_(const ops::BackwardInplace& call) {
  check_writable(call.dy, "dy");
  const bool dense_already = call.dy.is_contiguous(call.dy.suggest_memory_format());
  const FreshOutput dx = dense_already ? FreshOutput{call.dy, false} : fresh_output(call.dy);
  auto result = whole_backward(call, dx);
  if (!dense_already) {
    call.dy.copy_(dx.tensor);
  }
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gradient_sums(const ops::GradientSums& call) {
  const bool relu = is_relu(call.activation);
  check_gradient_sums(call, relu);
  auto sums = at::empty({2, call.dy.size(1)}, call.dy.options().dtype(at::kDouble));
  auto [dweight, dbias, dresidual] = run_backward(call, relu, kNotWanted, sums, kernels::table().gradient_sums);
  return {sums, dweight, dbias, dresidual};
}

at::Tensor gradient_of_input(const ops::GradientOfInput& call) {
  const bool relu = is_relu(call.activation);
  check_gradient_of_input(call, relu);
  const auto dx = fresh_output(call.dy);
  if (call.dy.numel() == 0) {
    return dx.tensor;
  }
  const auto sums = call.sums.contiguous();
  BackwardTensors tensors(call, relu);
  tensors.use_x(call.x);
  tensors.write_to(dx, kNotWanted);
  // They are only read here.
  tensors.args().sums = const_cast<double*>(sums.const_data_ptr<double>());
  kernels::table().gradient_of_input(tensors.args());
  return dx.tensor;
}

void advance_schedule_(const ops::AdvanceSchedule& call) {
  check_advance_schedule(call);
  advance_schedule(call.cur_iter, call.momentum, call.total_iters, call.schedule);
}

}  // namespace

TORCH_LIBRARY_IMPL(momentum_bn, CPU, m) {
  ops::implement<batch_statistics, forward_train, forward_train_, forward_functional, backward, backward_,
                 gradient_sums, gradient_of_input, advance_schedule_>(m);
}

}  // namespace momentum_bn::cpu
