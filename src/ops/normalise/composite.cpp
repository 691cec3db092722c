#include "ops/normalise/composite.h"

#include "kernels/channel_rules.h"
#include "ops/shared/kernel_tensors.h"

#include <ATen/ATen.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <torch/library.h>

#include <array>
#include <cmath>

namespace momentum_bn::composite {
namespace {

using kernels::normalising_variance_factor;
using kernels::running_variance_factor;
using ops::MaybeTensor;

/// Every dimension of x but the channels.
std::vector<int64_t> reduced_dimensions(const at::Tensor& x) {
  std::vector<int64_t> dimensions = {0};
  for (int64_t d = 2; d < x.dim(); ++d) {
    dimensions.push_back(d);
  }
  return dimensions;
}

/// (C) as (1, C, 1, ...), to be broadcast over x.
at::Tensor per_channel(const at::Tensor& values, const at::Tensor& x) {
  c10::SymDimVector shape(x.dim(), 1);
  shape[1] = x.sym_size(1);
  return values.view_symint(shape);
}

/// `values` in x's dtype and memory format.
at::Tensor output_like(const at::Tensor& values, const at::Tensor& x) {
  const auto cast = values.to(x.scalar_type());
  // torch.func.vmap knows no memory formats; its examples get their strides from the elementwise operations.
  return at::functorch::isBatchedTensor(cast) ? cast : cast.contiguous(x.suggest_memory_format());
}

/// Batch mean (in two parts: the value and what it lost to rounding) and sum of squared deviations, (C) each.
struct Moments {
  at::Tensor mean;
  at::Tensor mean_rest;
  at::Tensor m2;

  Moments detached() const { return {mean.detach(), mean_rest.detach(), m2.detach()}; }
};

/// The same with the number n of values per channel.
/// @tparam Count  double, or at::Tensor: 0-d on x's device
template <typename Count>
struct Batch {
  Moments moments;
  Count n;

  at::Tensor unbiased_variance() const { return moments.m2 / (n - 1); }
};

/// Number of values per channel; NaN without channels.
double values_per_channel(const at::Tensor& x) {
  const int64_t values = x.sym_numel().guard_int(__FILE__, __LINE__);
  return static_cast<double>(values) / static_cast<double>(x.sym_size(1).guard_int(__FILE__, __LINE__));
}

Moments moments_of(const at::Tensor& x) {
  const auto values = x.to(accumulate_type(x.scalar_type()));
  const auto dimensions = reduced_dimensions(x);
  // The mean, then the mean of what is left: exact also where the mean is far larger than the deviation.
  const auto mean = values.mean(dimensions);
  const auto deviation = values - per_channel(mean, x);
  const auto rest = deviation.mean(dimensions);
  return {mean, rest, (deviation - per_channel(rest, x)).square().sum(dimensions)};
}

/// Merges the statistics of all ranks (Chan, Golub, LeVeque 1979).
/// @param all  (ranks, 2C + 1), see `_batch_statistics` in schemas.cpp
Batch<at::Tensor> merged(const at::Tensor& all) {
  const int64_t channels = (all.size(1) - 1) / 2;
  const auto means = all.narrow(1, 0, channels);
  const auto counts = all.narrow(1, 2 * channels, 1);
  const auto n = counts.sum();
  const auto mean = (means * (counts / n)).sum(0);
  const auto m2 = (all.narrow(1, channels, channels) + counts * (means - mean).square()).sum(0);
  return {{mean, at::zeros_like(mean), m2}, n};
}

/// The first three rows of `saved`: the mean that normalises, what it lost to rounding, and 1 / std.
struct Statistics {
  at::Tensor center;
  at::Tensor rest;
  at::Tensor rstd;
};

Statistics statistics_of(const at::Tensor& saved) {
  return {saved.select(0, 0), saved.select(0, 1), saved.select(0, 2)};
}

/// x less the mean that normalises, in the accumulate type.
at::Tensor centered(const at::Tensor& x, const Statistics& statistics) {
  return x.to(accumulate_type(x.scalar_type())) - per_channel(statistics.center, x) - per_channel(statistics.rest, x);
}

/// y = activation((x - mean) / std * weight + bias + residual), differentiable in everything.
at::Tensor normalize(const TrainInputs& inputs, const Statistics& statistics, bool relu) {
  const at::Tensor& x = inputs.x;
  const auto type = accumulate_type(x.scalar_type());
  auto y = centered(x, statistics) * per_channel(statistics.rstd, x);
  if (inputs.weight && inputs.weight->defined()) {
    y = y * per_channel(inputs.weight->to(type), x);
  }
  if (inputs.bias && inputs.bias->defined()) {
    y = y + per_channel(inputs.bias->to(type), x);
  }
  if (inputs.residual && inputs.residual->defined()) {
    y = y + inputs.residual->to(type);
  }
  if (relu) {
    y = y.relu();
  }
  return output_like(y, x);
}

/// [m * batch + (1 - m) * running], in x's accumulate type.
/// @param m  0-d, or undefined: the batch alone
template <typename Count>
Statistics blend(const at::Tensor& x, const Batch<Count>& batch, const at::Tensor& running_mean,
                 const at::Tensor& running_var, const at::Tensor& m, const kernels::BlendOptions& options) {
  const auto type = blend_type(x);
  auto mean = batch.moments.mean.to(type) + batch.moments.mean_rest;
  auto var = batch.unbiased_variance().to(type) * normalising_variance_factor(options, batch.n);
  if (m.defined()) {
    const auto weight = m.to(type);
    mean = weight * mean + (1 - weight) * running_mean.detach().to(type);
    var = weight * var + (1 - weight) * running_var.detach().to(type);
  }
  const auto accumulate = accumulate_type(x.scalar_type());
  const auto rounded = mean.to(accumulate);
  return {rounded, (mean - rounded).to(accumulate), (var + options.eps).rsqrt().to(accumulate)};
}

/// `saved` of schemas.cpp.
/// @param m  as for blend()
template <typename Count>
at::Tensor saved_of(const at::Tensor& x, const Batch<Count>& batch, const Statistics& statistics, const at::Tensor& m,
                    const ops::Options& options) {
  std::vector<at::Tensor> rows = {statistics.center, statistics.rest, statistics.rstd};
  if (!options.detach_statistics) {
    const auto type = blend_type(x);
    const auto weight = m.defined() ? m.to(type) : at::ones({}, statistics.center.options().dtype(type));
    const auto mean = batch.moments.mean.to(type) + batch.moments.mean_rest;
    const auto per_value = normalising_variance_factor(blend_options_of(options), batch.n) / (batch.n - 1);
    rows.push_back(statistics.center.to(type) + statistics.rest - mean);
    rows.push_back((weight / batch.n).to(type).expand_as(mean));
    rows.push_back((weight * per_value).to(type).expand_as(mean));
    for (auto& row : rows) {
      row = row.to(statistics.center.scalar_type());
    }
  }
  return at::stack(rows).detach();
}

/// The weight of the batch in the blend: a 0-d tensor on the state's device; undefined where it is 1.
at::Tensor blend_weight(const State& state) {
  if (!state.has_schedule()) {
    return {};
  }
  return at::where(state.momentum < 0, 1.0 / (state.cur_iter + 1).to(state.momentum.scalar_type()), state.momentum);
}

/// Writes weight * of_batch + (1 - weight) * running into `running`, wherever `where` is true (undefined: everywhere).
void move_running(const at::Tensor& running, const at::Tensor& of_batch, const at::Tensor& weight,
                  const at::Tensor& where) {
  const auto type = blend_type(running);
  const auto before = running.to(type);
  const auto w = weight.to(type);
  const auto after = w * of_batch + (1 - w) * before;
  running.copy_(where.defined() ? at::where(where, after, before) : after);
}

/// Takes the batch into the state, without waiting for the device.
template <typename Count>
void update_state(const State& state, const Batch<Count>& batch, const ops::Options& options) {
  if (!state.tracks()) {
    return;
  }
  const auto mean = batch.moments.mean + batch.moments.mean_rest;
  const auto factor = running_variance_factor(blend_options_of(options), batch.n);
  const auto type = blend_type(state.running_mean);
  state.num_batches_tracked.add_(1);
  if (!state.has_schedule()) {
    const auto weight = options.momentum ? at::full({}, *options.momentum, state.running_mean.options().dtype(type))
                                         : 1.0 / state.num_batches_tracked.to(type);
    move_running(state.running_mean, mean.to(type), weight, {});
    move_running(state.running_var, batch.unbiased_variance().to(type) * factor, weight, {});
    return;
  }
  const auto weight = blend_weight(state);
  state.view_mean_sum.add_(mean);
  state.view_var_sum.add_(batch.unbiased_variance());
  state.view_count.add_(1);
  const auto complete = state.view_count >= options.views_per_update;
  move_running(state.running_mean, state.view_mean_sum.to(type) / state.view_count, weight, complete);
  move_running(state.running_var, state.view_var_sum.to(type) / state.view_count * factor, weight, complete);
  state.view_mean_sum.masked_fill_(complete, 0);
  state.view_var_sum.masked_fill_(complete, 0);
  state.view_count.masked_fill_(complete, 0);
  advance_schedule(state.cur_iter, state.momentum, options.total_iters, options.schedule, complete);
}

/// A training forward after its checks. `state` takes no gradient.
template <typename Count>
std::tuple<at::Tensor, at::Tensor> normalize_and_update(const TrainInputs& inputs, const State& state,
                                                        const ops::Options& options, const Batch<Count>& batch) {
  const Batch<Count> constant = {batch.moments.detached(), batch.n};
  const auto& used = options.detach_statistics ? constant : batch;
  const auto m = blend_weight(state);
  const auto statistics = blend(inputs.x, used, state.running_mean, state.running_var, m, blend_options_of(options));
  auto saved = saved_of(inputs.x, constant, statistics, m, options);
  update_state(state, constant, options);
  return {normalize(inputs, statistics, is_relu(options.activation)), saved};
}

/// What normalised x, as functions of x: the numbers are those of `saved`, the derivatives those of a blend in which
/// the batch has the shares that `saved` tells.
struct ThroughStatistics {
  Statistics statistics;
  at::Tensor deviation;  // x - the batch's mean
};

ThroughStatistics through_statistics(const at::Tensor& x, const at::Tensor& saved) {
  const auto values = x.to(accumulate_type(x.scalar_type()));
  const auto dimensions = reduced_dimensions(x);
  const auto constant = statistics_of(saved);
  const auto batch_mean_rest = constant.rest - saved.select(0, 3);
  const auto of_x = [&](const at::Tensor& sum) { return sum - sum.detach(); };  // 0, but with derivatives
  const auto sum = of_x(values.sum(dimensions));
  const double n = values_per_channel(x);
  const auto deviation =
      values - per_channel(constant.center, x) - per_channel(batch_mean_rest, x) - per_channel(sum / n, x);
  const auto squares = of_x(deviation.square().sum(dimensions));
  const auto variance_change = saved.select(0, 5) * squares * constant.rstd.square();
  const auto rest = constant.rest + saved.select(0, 4) * sum;
  return {{constant.center, rest, constant.rstd * (1 + variance_change).rsqrt()}, deviation};
}

}  // namespace

at::Tensor packed_statistics(const at::Tensor& x) {
  check_input(x, std::nullopt);
  const auto options = x.options().dtype(blend_type(x));
  if (x.numel() == 0) {
    return at::zeros({2 * x.size(1) + 1}, options);
  }
  const auto [mean, rest, m2] = moments_of(x.detach());
  return at::cat({mean.to(options) + rest, m2.to(options), at::full({1}, values_per_channel(x), options)});
}

at::Tensor evaluate(const at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight,
                    const MaybeTensor& bias, const at::Tensor& running_mean, const at::Tensor& running_var, double eps,
                    bool relu) {
  if (x.sym_size(1) == 0) {
    return x.clone();  // at::batch_norm fails without channels
  }
  auto y = at::batch_norm(x, weight.value_or(at::Tensor()), bias.value_or(at::Tensor()), running_mean, running_var,
                          /*training=*/false, /*momentum=*/0, eps, /*cudnn_enabled=*/true);
  if (residual && residual->defined()) {
    y = y + *residual;
  }
  return relu ? y.relu() : y;
}

std::tuple<at::Tensor, at::Tensor> forward_train(const ops::ForwardTrain& call) {
  const auto& options = call.options;
  check_options(options);
  const auto inputs = inputs_of(call);
  const Group group(call.process_group, call.group_statistics);
  auto state = State::of(call.state);
  const at::Tensor& x = call.x;
  if (!check_forward_train(inputs, state, group.has_others())) {
    return {x.clone(), zero_saved(x, options.detach_statistics)};
  }
  state = state.detached();
  if (!group.has_others()) {
    return normalize_and_update(inputs, state, options, Batch<double>{moments_of(x), values_per_channel(x)});
  }
  const auto batch = merged(group.statistics(x.detach()));
  if (!(values_per_channel(x) >= 2)) {
    const auto n = batch.n.item<double>();
    if (n == 0) {
      return {x.clone(), zero_saved(x, options.detach_statistics)};
    }
    check_group_statistics(x, n);
  }
  return normalize_and_update(inputs, state, options, batch);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_functional(const ops::ForwardFunctional& call) {
  const at::Tensor& x = call.x;
  kernels::BlendOptions options = {};
  options.variance = variance_of(call.variance);
  options.eps = call.eps;
  const bool any = check_forward_functional(call);
  const auto type = accumulate_type(x.scalar_type());
  if (!any) {
    const auto nothing = at::zeros_symint({x.sym_size(1)}, x.options().dtype(type));
    return {x.clone(), nothing, nothing.clone(), zero_saved(x)};
  }
  const Batch<double> batch = {moments_of(x).detached(), values_per_channel(x)};
  at::Tensor running_mean = call.running_mean.value_or(at::Tensor());
  at::Tensor running_var = call.running_var.value_or(at::Tensor());
  const auto m = running_mean.defined() ? at::full({}, call.momentum, x.options().dtype(blend_type(x))) : at::Tensor();
  const auto statistics = blend(x, batch, running_mean, running_var, m, options);
  const MaybeTensor none;
  const auto saved = at::stack({statistics.center, statistics.rest, statistics.rstd});
  return {normalize({x, none, call.weight, call.bias}, statistics, /*relu=*/false),
          (batch.moments.mean + batch.moments.mean_rest).to(type), batch.unbiased_variance().to(type), saved};
}

void forward_eval_(const ops::ForwardEvalInplace& call) {
  const bool relu = is_relu(call.activation);
  check_forward_eval(call);
  check_writable(call.x, "x");
  call.x.copy_(
      evaluate(call.x, call.residual, call.weight, call.bias, call.running_mean, call.running_var, call.eps, relu));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(const ops::Backward& call) {
  const bool relu = is_relu(call.activation);
  check_backward(call, relu);
  const at::Tensor& dy = call.dy;
  const auto type = accumulate_type(dy.scalar_type());
  const auto dimensions = reduced_dimensions(dy);
  const bool through = is_through_statistics(call.saved);
  ThroughStatistics used = {statistics_of(call.saved), {}};
  if (through && call.x) {
    used = through_statistics(*call.x, call.saved);
  }
  auto g = dy.to(type);
  if (relu) {
    const MaybeTensor none;
    const bool has_y = call.y && call.y->defined();
    const auto y =
        has_y ? *call.y : normalize({*call.x, none, call.weight, call.bias}, statistics_of(call.saved), /*relu=*/false);
    g = g * (y.detach() > 0);
  }

  std::array<at::Tensor, 4> gradients;
  at::Tensor sum_gx;
  if (call.output_mask[1] || (call.output_mask[0] && through)) {
    sum_gx = (g * centered(*call.x, used.statistics)).sum(dimensions);
  }
  if (call.output_mask[0]) {
    auto scale = used.statistics.rstd;
    if (call.weight && call.weight->defined()) {
      scale = scale * call.weight->to(type);
    }
    auto dx = g;
    if (through) {
      const auto of_mean = call.saved.select(0, 4) * g.sum(dimensions);
      const auto of_variance = call.saved.select(0, 5) * sum_gx * used.statistics.rstd.square();
      dx = g - per_channel(of_mean, dy) - used.deviation * per_channel(of_variance, dy);
    }
    gradients[0] = output_like(dx * per_channel(scale, dy), dy);
  }
  if (call.output_mask[1]) {
    gradients[1] = (sum_gx * used.statistics.rstd).to(call.weight->scalar_type());
  }
  if (call.output_mask[2]) {
    gradients[2] = g.sum(dimensions);
  }
  if (call.output_mask[3]) {
    gradients[3] = output_like(g, dy);
  }
  return {gradients[0], gradients[1], gradients[2], gradients[3]};
}

void advance_schedule(const at::Tensor& cur_iter, const at::Tensor& momentum, int64_t total_iters, ops::Word schedule,
                      const at::Tensor& where) {
  const auto moved = where.defined() ? where : at::ones_like(cur_iter, at::kBool);
  cur_iter.add_(moved);
  if (schedule_of(schedule) == Schedule::Constant) {
    return;
  }
  const auto progress = cur_iter.clamp_max(total_iters).to(momentum.scalar_type()) / total_iters;
  const auto scheduled = ((progress * M_PI).cos() + 1) * 0.5;
  momentum.copy_(at::where(moved.logical_and(momentum >= 0), scheduled, momentum));
}

namespace {

at::Tensor forward_train_(const ops::ForwardTrainInplace& call) {
  check_writable(call.x, "x");
  auto [y, saved] = forward_train(ops::as<ops::ForwardTrain>(call));
  call.x.copy_(y);
  return saved;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_(const ops::BackwardInplace& call) {
  check_writable(call.dy, "dy");
  auto fresh = ops::as<ops::Backward>(call);
  fresh.output_mask[0] = true;
  auto [dx, dweight, dbias, dresidual] = backward(fresh);
  call.dy.copy_(dx);
  return {dweight, dbias, dresidual};
}

/// One process's part of the sums: see schemas.cpp.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gradient_sums(const ops::GradientSums& call) {
  const bool relu = is_relu(call.activation);
  check_gradient_sums(call, relu);
  auto whole = ops::as<ops::Backward>(call);
  whole.output_mask = {false, false, true, true};
  const auto [_, dweight, sum_g, g] = backward(whole);
  const auto dimensions = reduced_dimensions(call.dy);
  const auto statistics = statistics_of(call.saved);
  const auto sum_gx = (g.to(sum_g.scalar_type()) * centered(*call.x, statistics)).sum(dimensions);
  const auto mask = call.output_mask;
  return {at::stack({sum_g, sum_gx}).to(blend_type(call.dy)),
          mask[1] ? (sum_gx * statistics.rstd).to(call.weight->scalar_type()) : at::Tensor(),
          mask[2] ? sum_g : at::Tensor(), mask[3] ? g : at::Tensor()};
}

at::Tensor gradient_of_input(const ops::GradientOfInput& call) {
  const bool relu = is_relu(call.activation);
  check_gradient_of_input(call, relu);
  const MaybeTensor x = call.x;
  const ops::Backward masked = {call.dy,   x,          call.y,          call.weight,
                                call.bias, call.saved, call.activation, {false, false, false, true}};
  const auto g = std::get<3>(backward(masked)).to(call.saved.scalar_type());
  const auto used = through_statistics(call.x, call.saved);
  const auto sums = call.sums.to(call.saved.scalar_type());
  const auto of_mean = call.saved.select(0, 4) * sums[0];
  const auto of_variance = call.saved.select(0, 5) * sums[1] * used.statistics.rstd.square();
  auto scale = used.statistics.rstd;
  if (call.weight && call.weight->defined()) {
    scale = scale * call.weight->to(scale.scalar_type());
  }
  const auto dx = g - per_channel(of_mean, g) - used.deviation * per_channel(of_variance, g);
  return output_like(dx * per_channel(scale, g), call.dy);
}

void advance_schedule_(const ops::AdvanceSchedule& call) {
  check_advance_schedule(call);
  advance_schedule(call.cur_iter, call.momentum, call.total_iters, call.schedule, {});
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

template <typename Train, auto kForward>
typename Train::Result mapped(const Train& call) {
  check_can_be_mapped(call.x, call.state, call.process_group || call.group_statistics);
  return kForward(call);
}

at::Tensor mapped_batch_statistics(const ops::BatchStatistics& call) {
  check_can_be_mapped(call.x, {}, /*in_group=*/true);
  return {};
}

at::Tensor mapped_group_statistics(const ops::GroupStatistics& call) { return mapped_batch_statistics({call.x}); }

at::Tensor batch_statistics(const ops::BatchStatistics& call) { return packed_statistics(call.x); }

}  // namespace

TORCH_LIBRARY_IMPL(momentum_bn, CompositeExplicitAutograd, m) {
  ops::implement<batch_statistics, forward_train, forward_train_, forward_eval_, forward_functional, backward,
                 backward_, gradient_sums, gradient_of_input, advance_schedule_>(m);
}

// torch.func.vmap has rules of its own for the at:: operations.
TORCH_LIBRARY_IMPL(momentum_bn, FuncTorchBatched, m) {
  ops::implement<mapped_batch_statistics, mapped_group_statistics, mapped<ops::ForwardTrain, forward_train>,
                 mapped<ops::ForwardTrainInplace, forward_train_>, forward_eval_, forward_functional>(m);
}

}  // namespace momentum_bn::composite
