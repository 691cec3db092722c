#include "models/normalisation.h"

#include <momentum_bn/batch_norm.h>
#include <momentum_bn/modules.h>

#include <ATen/ops/batch_norm.h>
#include <torch/nn/modules/batchnorm.h>

namespace m2teacher {
namespace {

template <typename Module>
class BatchNorm : public Norm {
 public:
  BatchNorm(torch::nn::Module& parent, const std::string& name, const NormOptions& options)
      : module_(parent.register_module(name, Module(options.channels))), relu_(options.relu) {}

  at::Tensor forward(const at::Tensor& x, const at::Tensor& residual) override {
    at::Tensor y = normalise(x);
    if (residual.defined()) {
      y.add_(residual);
    }
    return relu_ ? y.relu_() : y;
  }

 protected:
  virtual at::Tensor normalise(const at::Tensor& x) { return module_(x); }

  Module module_;

 private:
  bool relu_;
};

template <typename Module>
class EvaluatedBatchNorm : public BatchNorm<Module> {
 public:
  using BatchNorm<Module>::BatchNorm;

 protected:
  at::Tensor normalise(const at::Tensor& x) override {
    auto& layer = *this->module_;
    return at::batch_norm(x, layer.weight, layer.bias, layer.running_mean, layer.running_var, /*training=*/false,
                          /*momentum=*/0, layer.options.eps(), /*cudnn_enabled=*/true);
  }
};

/// A layer of momentum_bn, which adds the residual and applies the ReLU itself.
template <typename Module>
class FusedNorm : public Norm {
 public:
  /// @param complete  sets the options that not all layers have
  template <typename Complete>
  FusedNorm(torch::nn::Module& parent, const std::string& name, const NormOptions& options, const Complete& complete)
      : module_(parent.register_module(name, Module(complete(layer_options(options))))) {}

  at::Tensor forward(const at::Tensor& x, const at::Tensor& residual) override { return module_(x, residual); }

 private:
  static auto layer_options(const NormOptions& options) {
    return typename Module::Impl::Options(options.channels)
        .activation(options.relu ? momentum_bn::Activation::ReLU : momentum_bn::Activation::None)
        .inplace(true);
  }

  Module module_;
};

/// A factory of `Layer<Layer1d>` and `Layer<Layer2d>`, as the input asks for.
/// @param more  what their constructors take beside the common arguments
template <template <typename> typename Layer, typename Layer1d, typename Layer2d, typename... More>
NormFactory factory(const More&... more) {
  return [more...](torch::nn::Module& parent, const std::string& name,
                   const NormOptions& options) -> std::unique_ptr<Norm> {
    if (options.spatial) {
      return std::make_unique<Layer<Layer2d>>(parent, name, options, more...);
    }
    return std::make_unique<Layer<Layer1d>>(parent, name, options, more...);
  };
}

}  // namespace

NormFactory batch_norm() { return factory<BatchNorm, torch::nn::BatchNorm1d, torch::nn::BatchNorm2d>(); }

NormFactory evaluated_batch_norm() {
  return factory<EvaluatedBatchNorm, torch::nn::BatchNorm1d, torch::nn::BatchNorm2d>();
}

NormFactory fused_batch_norm() {
  return factory<FusedNorm, momentum_bn::BatchNorm1d, momentum_bn::BatchNorm2d>(
      [](const auto& options) { return options; });
}

NormFactory momentum_batch_norm(const std::optional<std::string>& process_group, int64_t views_per_update) {
  return factory<FusedNorm, momentum_bn::MomentumBatchNorm1d, momentum_bn::MomentumBatchNorm2d>(
      [=](auto options) { return options.process_group(process_group).views_per_update(views_per_update); });
}

}  // namespace m2teacher
