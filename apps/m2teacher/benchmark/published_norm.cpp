#include "benchmark/published_norm.h"

#include <ATen/ops/mean.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/var.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <numbers>
#include <vector>

namespace m2teacher {
namespace {

constexpr double kEps = 1e-5;
constexpr int64_t kTotalIters = 10'000;

class PublishedNorm : public Norm {
 public:
  PublishedNorm(torch::nn::Module& parent, const std::string& name, const NormOptions& options)
      : dims_(options.spatial ? std::vector<int64_t>{0, 2, 3} : std::vector<int64_t>{0}),
        shape_(options.spatial ? std::vector<int64_t>{1, -1, 1, 1} : std::vector<int64_t>{1, -1}),
        relu_(options.relu) {
    const auto module = parent.register_module(name, std::make_shared<torch::nn::Module>());
    weight_ = module->register_parameter("weight", at::ones({options.channels}));
    bias_ = module->register_parameter("bias", at::zeros({options.channels}));
    running_mean_ = module->register_buffer("running_mean", at::zeros({options.channels}));
    running_var_ = module->register_buffer("running_var", at::ones({options.channels}));
  }

  at::Tensor forward(const at::Tensor& x, const at::Tensor& residual) override {
    const at::Tensor mean = at::mean(x, dims_);
    const at::Tensor var = at::var(x, dims_);
    const double n = static_cast<double>(x.numel()) / static_cast<double>(x.size(1));
    const double correction = n / (n - 1);
    const at::Tensor blended_mean = momentum_ * mean + (1 - momentum_) * running_mean_;
    const at::Tensor blended_var = momentum_ * var * correction + (1 - momentum_) * running_var_;
    at::Tensor y = (x - blended_mean.view(shape_)) / at::sqrt(blended_var.view(shape_) + kEps);
    y = y * weight_.view(shape_) + bias_.view(shape_);
    update(mean, var, correction);
    if (residual.defined()) {
      y = y + residual;
    }
    return relu_ ? y.relu() : y;
  }

 private:
  void update(const at::Tensor& mean, const at::Tensor& var, double correction) {
    if (!first_mean_.defined()) {
      first_mean_ = mean;
      first_var_ = var;
      return;
    }
    running_mean_ = momentum_ * (first_mean_ + mean) / 2 + (1 - momentum_) * running_mean_;
    running_var_ = momentum_ * (first_var_ + var) / 2 * correction + (1 - momentum_) * running_var_;
    first_mean_.reset();
    first_var_.reset();
    ++cur_iter_;
    momentum_ = (std::cos(std::numbers::pi * static_cast<double>(cur_iter_) / kTotalIters) + 1) / 2;
  }

  std::vector<int64_t> dims_;
  std::vector<int64_t> shape_;
  bool relu_;
  at::Tensor weight_;
  at::Tensor bias_;
  at::Tensor running_mean_;
  at::Tensor running_var_;
  at::Tensor first_mean_;
  at::Tensor first_var_;
  double momentum_ = 1;
  int64_t cur_iter_ = 0;
};

}  // namespace

NormFactory published_norm() {
  return [](torch::nn::Module& parent, const std::string& name, const NormOptions& options) -> std::unique_ptr<Norm> {
    return std::make_unique<PublishedNorm>(parent, name, options);
  };
}

}  // namespace m2teacher
