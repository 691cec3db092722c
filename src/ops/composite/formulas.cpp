#include "ops/composite/formulas.h"

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

/// The dtype of statistics that are blended: float64 where the device has it.
at::ScalarType blend_type(const at::Tensor& x) { return x.device().is_mps() ? at::kFloat : at::kDouble; }

}  // namespace

at::ScalarType accumulate_type(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

double values_per_channel(const at::Tensor& x) {
  const int64_t values = x.sym_numel().guard_int(__FILE__, __LINE__);
  return static_cast<double>(values) / static_cast<double>(x.sym_size(1).guard_int(__FILE__, __LINE__));
}

BatchStatistics batch_statistics(const at::Tensor& x) {
  const auto values = x.detach().to(accumulate_type(x.scalar_type()));
  const auto dimensions = reduced_dimensions(x);
  const double n = values_per_channel(x);
  // The mean, then the mean of what is left: exact also where the mean is far larger than the deviation.
  const auto mean = values.mean(dimensions);
  const auto deviation = values - per_channel(mean, x);
  const auto rest = deviation.mean(dimensions);
  const auto var = (deviation - per_channel(rest, x)).square().sum(dimensions) / (n - 1);
  return {mean, rest, var};
}

at::Tensor blend(const at::Tensor& x, const BatchStatistics& batch, const at::Tensor& running_mean,
                 const at::Tensor& running_var, const at::Tensor& momentum, double eps, Variance variance) {
  const auto type = blend_type(x);
  auto mean = batch.mean.to(type) + batch.mean_rest;
  auto var = batch.var.to(type) * normalising_variance_factor(variance, values_per_channel(x));
  if (momentum.defined()) {
    const auto m = momentum.to(type);
    mean = m * mean + (1 - m) * running_mean.detach().to(type);
    var = m * var + (1 - m) * running_var.detach().to(type);
  }
  const auto accumulate = accumulate_type(x.scalar_type());
  const auto rounded = mean.to(accumulate);
  return at::stack({rounded, (mean - rounded).to(accumulate), (var + eps).rsqrt().to(accumulate)});
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
                                                 const Config& config) {
  if (!check_forward_train(x, residual, weight, bias, state)) return {x.clone(), zero_saved(x)};
  state = detached(state);
  const auto batch = batch_statistics(x);
  const auto saved =
      blend(x, batch, state.running_mean, state.running_var, current_momentum(state), config.eps, config.variance);
  update_state(state, batch, values_per_channel(x), config);
  return {normalize(x, saved, weight, bias, residual, config.activation), saved};
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

at::Tensor current_momentum(const State& state) {
  if (!state.tracks()) return {};
  return at::where(state.momentum < 0, 1.0 / (state.cur_iter + 1).to(state.momentum.scalar_type()), state.momentum);
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

void update_state(State& state, const BatchStatistics& batch, double n, const Config& config) {
  if (!state.tracks()) return;
  const auto m = current_momentum(state);
  state.num_batches_tracked.add_(1);
  state.view_mean_sum.add_(batch.mean + batch.mean_rest);
  state.view_var_sum.add_(batch.var);
  state.view_count.add_(1);

  const auto complete = state.view_count >= config.views_per_update;
  const auto updated = [&](const at::Tensor& running, const at::Tensor& sum, double factor) {
    const auto type = blend_type(running);
    const auto mean_of_views = sum.to(type) / state.view_count * factor;
    return at::where(complete, m * mean_of_views + (1 - m) * running.to(type), running.to(type));
  };
  state.running_mean.copy_(updated(state.running_mean, state.view_mean_sum, 1));
  state.running_var.copy_(updated(state.running_var, state.view_var_sum, running_variance_factor(config.variance, n)));
  state.view_mean_sum.masked_fill_(complete, 0);
  state.view_var_sum.masked_fill_(complete, 0);
  state.view_count.masked_fill_(complete, 0);
  advance_schedule(state.cur_iter, state.momentum, config.total_iters, config.schedule, complete);
}

}  // namespace momentum_bn::composite
