#include "ops/composite/formulas.h"

#include "ops/checks.h"
#include "ops/inputs.h"

#include <ATen/ATen.h>
#include <ATen/functorch/BatchedTensorImpl.h>

#include <array>
#include <cmath>

namespace momentum_bn::composite {
namespace {

/// Every dimension of x but the channels.
std::vector<int64_t> reduced_dimensions(const at::Tensor& x) {
  std::vector<int64_t> dimensions = {0};
  for (int64_t d = 2; d < x.dim(); ++d) dimensions.push_back(d);
  return dimensions;
}

/// (C) as (1, C, 1, ...), to be broadcast over x.
at::Tensor per_channel(const at::Tensor& values, const at::Tensor& x) {
  c10::SymDimVector shape(x.dim(), 1);
  shape[1] = x.sym_size(1);
  return values.view_symint(shape);
}

/// A state that takes no gradient, for operations that change it.
State detached(const State& state) {
  if (!state.tracks()) return {};
  auto tensors = state.tensors();
  for (auto& tensor : tensors) tensor = tensor.detach();
  return State::of(tensors);
}

/// `values` in x's dtype and memory format.
at::Tensor output_like(const at::Tensor& values, const at::Tensor& x) {
  const auto cast = values.to(x.scalar_type());
  // torch.func.vmap knows no memory formats; its examples get their strides from the elementwise operations.
  return at::functorch::isBatchedTensor(cast) ? cast : cast.contiguous(x.suggest_memory_format());
}

/// Batch mean (in two parts: the value and what it lost to rounding) and sum of squared deviations, (C) each, detached.
struct Moments {
  at::Tensor mean;
  at::Tensor mean_rest;
  at::Tensor m2;
};

/// The same with the unbiased batch variance, and the number n of values per channel.
/// @tparam Count  double, or at::Tensor: 0-d on x's device
template <typename Count>
struct BatchStatistics {
  at::Tensor mean;
  at::Tensor mean_rest;
  at::Tensor var;
  Count n;
};

/// Number of values per channel; NaN without channels.
double values_per_channel(const at::Tensor& x) {
  const int64_t values = x.sym_numel().guard_int(__FILE__, __LINE__);
  return static_cast<double>(values) / static_cast<double>(x.sym_size(1).guard_int(__FILE__, __LINE__));
}

Moments moments(const at::Tensor& x) {
  const auto values = x.detach().to(accumulate_type(x.scalar_type()));
  const auto dimensions = reduced_dimensions(x);
  // The mean, then the mean of what is left: exact also where the mean is far larger than the deviation.
  const auto mean = values.mean(dimensions);
  const auto deviation = values - per_channel(mean, x);
  const auto rest = deviation.mean(dimensions);
  return {mean, rest, (deviation - per_channel(rest, x)).square().sum(dimensions)};
}

BatchStatistics<double> batch_statistics(const at::Tensor& x) {
  const double n = values_per_channel(x);
  const auto [mean, rest, m2] = moments(x);
  return {mean, rest, m2 / (n - 1), n};
}

/// Of all ranks: Chan, Golub, LeVeque 1979.
/// @param all  (ranks, 2C + 1), see `_batch_statistics` in schemas.cpp
BatchStatistics<at::Tensor> merged_statistics(const at::Tensor& all) {
  const int64_t channels = (all.size(1) - 1) / 2;
  const auto means = all.narrow(1, 0, channels);
  const auto counts = all.narrow(1, 2 * channels, 1);
  const auto n = counts.sum();
  const auto mean = (means * (counts / n)).sum(0);
  const auto m2 = (all.narrow(1, channels, channels) + counts * (means - mean).square()).sum(0);
  return {mean, at::zeros_like(mean), m2 / (n - 1), n};
}

/// Rows mean, rest of the mean, 1 / std (see schemas.cpp) of [m * batch + (1 - m) * running], in x's accumulate type.
/// @param momentum  0-d, or undefined: the batch alone
template <typename Count>
at::Tensor blend(const at::Tensor& x, const BatchStatistics<Count>& batch, const at::Tensor& running_mean,
                 const at::Tensor& running_var, const at::Tensor& momentum, double eps, Variance variance) {
  const auto type = blend_type(x);
  auto mean = batch.mean.to(type) + batch.mean_rest;
  auto var = batch.var.to(type) * normalising_variance_factor(variance, batch.n);
  if (momentum.defined()) {
    const auto m = momentum.to(type);
    mean = m * mean + (1 - m) * running_mean.detach().to(type);
    var = m * var + (1 - m) * running_var.detach().to(type);
  }
  const auto accumulate = accumulate_type(x.scalar_type());
  const auto rounded = mean.to(accumulate);
  return at::stack({rounded, (mean - rounded).to(accumulate), (var + eps).rsqrt().to(accumulate)});
}

/// The weight of the batch now: a 0-d tensor on the state's device; undefined where the layer does not track.
at::Tensor current_momentum(const State& state) {
  if (!state.tracks()) return {};
  return at::where(state.momentum < 0, 1.0 / (state.cur_iter + 1).to(state.momentum.scalar_type()), state.momentum);
}

/// Takes the batch into the state, without waiting for the device.
template <typename Count>
void update_state(State& state, const BatchStatistics<Count>& batch, const Config& config) {
  if (!state.tracks()) return;
  const auto m = current_momentum(state);
  state.num_batches_tracked.add_(1);
  state.view_mean_sum.add_(batch.mean + batch.mean_rest);
  state.view_var_sum.add_(batch.var);
  state.view_count.add_(1);

  const auto complete = state.view_count >= config.views_per_update;
  const auto updated = [&](const at::Tensor& running, const at::Tensor& mean_of_views) {
    const auto type = blend_type(running);
    return at::where(complete, m * mean_of_views + (1 - m) * running.to(type), running.to(type));
  };
  const auto of_views = [&](const at::Tensor& sum) { return sum.to(blend_type(sum)) / state.view_count; };
  const auto factor = running_variance_factor(config.variance, batch.n);
  state.running_mean.copy_(updated(state.running_mean, of_views(state.view_mean_sum)));
  state.running_var.copy_(updated(state.running_var, of_views(state.view_var_sum) * factor));
  state.view_mean_sum.masked_fill_(complete, 0);
  state.view_var_sum.masked_fill_(complete, 0);
  state.view_count.masked_fill_(complete, 0);
  advance_schedule(state.cur_iter, state.momentum, config.total_iters, config.schedule, complete);
}

/// A training forward whose checks are done; `state` takes no gradient.
template <typename Count>
std::tuple<at::Tensor, at::Tensor> normalize_and_update(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                                                        const std::optional<at::Tensor>& weight,
                                                        const std::optional<at::Tensor>& bias, State& state,
                                                        const Config& config, const BatchStatistics<Count>& batch) {
  const auto saved =
      blend(x, batch, state.running_mean, state.running_var, current_momentum(state), config.eps, config.variance);
  update_state(state, batch, config);
  return {normalize(x, saved, weight, bias, residual, config.activation), saved};
}

}  // namespace

at::ScalarType accumulate_type(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

at::ScalarType blend_type(const at::Tensor& x) { return x.device().is_mps() ? at::kFloat : at::kDouble; }

at::Tensor packed_statistics(const at::Tensor& x) {
  check_input(x, std::nullopt);
  const auto options = x.options().dtype(blend_type(x));
  if (x.numel() == 0) return at::zeros({2 * x.size(1) + 1}, options);
  const auto [mean, rest, m2] = moments(x);
  return at::cat({mean.to(options) + rest, m2.to(options), at::full({1}, values_per_channel(x), options)});
}

at::Tensor evaluate(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                    const at::Tensor& running_mean, const at::Tensor& running_var, double eps, Activation activation) {
  if (x.sym_size(1) == 0) return x.clone();  // at::batch_norm fails without channels
  auto y = at::batch_norm(x, weight.value_or(at::Tensor()), bias.value_or(at::Tensor()), running_mean, running_var,
                          /*training=*/false, /*momentum=*/0, eps, /*cudnn_enabled=*/true);
  if (residual && residual->defined()) y = y + *residual;
  return activation == Activation::ReLU ? y.relu() : y;
}

at::Tensor normalize(const at::Tensor& x, const at::Tensor& saved, const std::optional<at::Tensor>& weight,
                     const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                     Activation activation) {
  const auto type = accumulate_type(x.scalar_type());
  auto y = (x.to(type) - per_channel(saved.select(0, 0), x) - per_channel(saved.select(0, 1), x)) *
           per_channel(saved.select(0, 2), x);
  if (weight && weight->defined()) y = y * per_channel(weight->to(type), x);
  if (bias && bias->defined()) y = y + per_channel(bias->to(type), x);
  if (residual && residual->defined()) y = y + residual->to(type);
  if (activation == Activation::ReLU) y = y.relu();
  return output_like(y, x);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> normalize_backward(
    const at::Tensor& dy, const std::optional<at::Tensor>& x, const std::optional<at::Tensor>& y,
    const std::optional<at::Tensor>& weight, const at::Tensor& saved, Activation activation,
    std::array<bool, 4> output_mask) {
  check_backward(dy, x, y, weight, saved, activation == Activation::ReLU, output_mask);
  const auto type = accumulate_type(dy.scalar_type());
  const auto dimensions = reduced_dimensions(dy);
  auto g = dy.to(type);
  if (activation == Activation::ReLU) g = g * (y->detach() > 0);

  std::array<at::Tensor, 4> gradients;
  if (output_mask[0]) {
    auto scale = per_channel(saved.select(0, 2), dy);
    if (weight && weight->defined()) scale = scale * per_channel(weight->to(type), dy);
    gradients[0] = output_like(g * scale, dy);
  }
  if (output_mask[1]) {
    const auto xhat = (x->to(type) - per_channel(saved.select(0, 0), dy) - per_channel(saved.select(0, 1), dy)) *
                      per_channel(saved.select(0, 2), dy);
    gradients[1] = (g * xhat).sum(dimensions).to(weight->scalar_type());
  }
  if (output_mask[2]) gradients[2] = g.sum(dimensions);
  if (output_mask[3]) gradients[3] = output_like(g, dy);
  return {gradients[0], gradients[1], gradients[2], gradients[3]};
}

std::tuple<at::Tensor, at::Tensor> train_forward(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                                                 const std::optional<at::Tensor>& weight,
                                                 const std::optional<at::Tensor>& bias, State state,
                                                 const Config& config, const Group& group) {
  if (!check_forward_train(x, residual, weight, bias, state, group.has_others())) return {x.clone(), zero_saved(x)};
  state = detached(state);
  if (!group.has_others()) {
    return normalize_and_update(x, residual, weight, bias, state, config, batch_statistics(x));
  }
  const auto batch = merged_statistics(group.statistics(x.detach()));
  if (!(values_per_channel(x) >= 2)) {
    const auto n = batch.n.item<double>();
    if (n == 0) return {x.clone(), zero_saved(x)};
    check_group_statistics(x, n);
  }
  return normalize_and_update(x, residual, weight, bias, state, config, batch);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> functional_forward(
    const at::Tensor& x, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& running_mean, const std::optional<at::Tensor>& running_var, double momentum,
    double eps, Variance variance) {
  if (!check_forward_functional(x, weight, bias, running_mean, running_var, momentum, eps)) {
    const auto nothing = at::zeros_symint({x.sym_size(1)}, x.options().dtype(accumulate_type(x.scalar_type())));
    return {x.clone(), nothing, nothing.clone(), zero_saved(x)};
  }
  const auto batch = batch_statistics(x);
  const bool tracks = running_mean && running_mean->defined();
  const auto saved =
      blend(x, batch, tracks ? *running_mean : at::Tensor(), tracks ? *running_var : at::Tensor(),
            tracks ? at::full({}, momentum, x.options().dtype(blend_type(x))) : at::Tensor(), eps, variance);
  return {normalize(x, saved, weight, bias, std::nullopt, Activation::None), batch.mean + batch.mean_rest, batch.var,
          saved};
}

void advance_schedule(at::Tensor& cur_iter, at::Tensor& momentum, int64_t total_iters, Schedule schedule,
                      const at::Tensor& where) {
  const auto moved = where.defined() ? where : at::ones_like(cur_iter, at::kBool);
  cur_iter.add_(moved);
  if (schedule == Schedule::Constant) return;
  const auto progress = cur_iter.clamp_max(total_iters).to(momentum.scalar_type()) / total_iters;
  const auto scheduled = ((progress * M_PI).cos() + 1) * 0.5;
  momentum.copy_(at::where(moved.logical_and(momentum >= 0), scheduled, momentum));
}

at::Tensor weight_of_student(const at::Tensor& updates, int64_t total_iters, double param_momentum) {
  check_total_iters(total_iters);
  check_param_momentum(param_momentum);
  const auto progress = updates.clamp_max(total_iters).to(blend_type(updates)) / total_iters;
  return ((progress * M_PI).cos() + 1) * (0.5 * (1 - param_momentum));
}

void teacher_update(at::TensorList teacher, at::TensorList master, at::TensorList student, at::Tensor& updates,
                    int64_t total_iters, double param_momentum) {
  check_pairs(teacher, master, student, updates);
  const auto weight = weight_of_student(updates, total_iters, param_momentum);
  for (size_t i = 0; i < teacher.size(); ++i) {
    const bool has_master = master[i].numel() > 0;
    const auto& average = has_master ? master[i] : teacher[i];
    average.lerp_(student[i].to(average.scalar_type()), weight.to(average.options()));
    if (has_master) teacher[i].copy_(average);
  }
  updates.add_(1);
}

}  // namespace momentum_bn::composite
