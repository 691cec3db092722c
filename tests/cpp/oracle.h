#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

/// Momentum BatchNorm in plain float64 ATen operations: what the tests compare the product with.
/// Written from the definition of the layer alone; shares no code with the product.
namespace momentum_bn::oracle {

inline at::Tensor per_channel(const at::Tensor& values, const at::Tensor& x) {
  std::vector<int64_t> shape(x.dim(), 1);
  shape[1] = -1;
  return values.reshape(shape);
}

struct BatchStatistics {
  at::Tensor mean;
  at::Tensor var;  // unbiased
  double n;
};

inline BatchStatistics batch_statistics(const at::Tensor& x) {
  const at::Tensor values = x.detach().to(at::kDouble).transpose(0, 1).reshape({x.size(1), -1});
  const double n = static_cast<double>(values.size(1));
  const at::Tensor mean = values.mean(1);
  return {mean, (values - mean.unsqueeze(1)).square().sum(1) / (n - 1), n};
}

inline at::Tensor variance_to_normalise(const BatchStatistics& batch, const std::string& variance) {
  if (variance == "published") {
    return batch.var * (batch.n / (batch.n - 1));
  }
  return variance == "unbiased" ? batch.var : batch.var * ((batch.n - 1) / batch.n);
}

inline at::Tensor variance_to_keep(const at::Tensor& views_var, double n, const std::string& variance) {
  return variance == "published" ? views_var * (n / (n - 1)) : views_var;
}

inline double cosine_schedule(int64_t cur_iter, int64_t total_iters) {
  const double progress = static_cast<double>(std::min(cur_iter, total_iters)) / static_cast<double>(total_iters);
  return (std::cos(M_PI * progress) + 1) / 2;
}

inline double teacher_momentum(int64_t updates, int64_t total_iters, double start) {
  return 1 - (1 - start) * cosine_schedule(updates, total_iters);
}

/// float64 output; differentiable in x, weight, bias and residual, not in mean and var.
inline at::Tensor normalise(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& var, double eps,
                            const at::Tensor& weight = {}, const at::Tensor& bias = {}, const at::Tensor& residual = {},
                            bool relu = false) {
  at::Tensor y = (x.to(at::kDouble) - per_channel(mean.detach(), x)) / per_channel((var.detach() + eps).sqrt(), x);
  if (weight.defined()) {
    y = y * per_channel(weight.to(at::kDouble), x);
  }
  if (bias.defined()) {
    y = y + per_channel(bias.to(at::kDouble), x);
  }
  if (residual.defined()) {
    y = y + residual.to(at::kDouble);
  }
  return relu ? at::relu(y) : y;
}

/// The layer's state machine.
struct MomentumBatchNorm {
  explicit MomentumBatchNorm(int64_t num_features)
      : running_mean(at::zeros({num_features}, at::kDouble)),
        running_var(at::ones({num_features}, at::kDouble)),
        view_mean_sum(at::zeros({num_features}, at::kDouble)),
        view_var_sum(at::zeros({num_features}, at::kDouble)) {}

  double eps = 1e-5;
  std::optional<double> momentum = 1.0;
  int64_t total_iters = 100;
  int64_t views_per_update = 2;
  bool cosine = true;
  std::string variance = "published";
  bool relu = false;

  int64_t cur_iter = 0;
  int64_t view_count = 0;
  at::Tensor running_mean;
  at::Tensor running_var;
  at::Tensor view_mean_sum;
  at::Tensor view_var_sum;

  at::Tensor train_forward(const at::Tensor& x, const at::Tensor& weight = {}, const at::Tensor& bias = {},
                           const at::Tensor& residual = {}) {
    const double m = momentum.value_or(1.0 / static_cast<double>(cur_iter + 1));
    const BatchStatistics batch = batch_statistics(x);
    const at::Tensor mean = m * batch.mean + (1 - m) * running_mean;
    const at::Tensor var = m * variance_to_normalise(batch, variance) + (1 - m) * running_var;
    const at::Tensor y = normalise(x, mean, var, eps, weight, bias, residual, relu);
    remember(batch, m);
    return y;
  }

  at::Tensor eval_forward(const at::Tensor& x, const at::Tensor& weight = {}, const at::Tensor& bias = {}) const {
    return normalise(x, running_mean, running_var, eps, weight, bias, {}, relu);
  }

 private:
  void remember(const BatchStatistics& batch, double m) {
    view_mean_sum = view_mean_sum + batch.mean;
    view_var_sum = view_var_sum + batch.var;
    if (++view_count < views_per_update) {
      return;
    }
    const double views = static_cast<double>(view_count);
    running_mean = m * (view_mean_sum / views) + (1 - m) * running_mean;
    running_var = m * variance_to_keep(view_var_sum / views, batch.n, variance) + (1 - m) * running_var;
    view_mean_sum = at::zeros_like(view_mean_sum);
    view_var_sum = at::zeros_like(view_var_sum);
    view_count = 0;
    ++cur_iter;
    if (cosine && momentum) {
      momentum = cosine_schedule(cur_iter, total_iters);
    }
  }
};

}  // namespace momentum_bn::oracle
