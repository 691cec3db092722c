#pragma once

#include <momentum_bn/options.h>

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any.h>

#include <functional>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

namespace momentum_bn {

/// What all layers of this library share: parameters, running statistics, casts, archives, evaluation and the call of
/// the operator. A layer adds its options and, where it has more than torch's BatchNorm, its state.
class MOMENTUM_BN_API NormLayer {
 public:
  virtual ~NormLayer() = default;

  /// Makes all of the state new.
  virtual void reset_running_stats();
  /// reset_running_stats(), weight 1, bias 0.
  void reset_parameters();

  at::Tensor weight;
  at::Tensor bias;
  at::Tensor running_mean;
  at::Tensor running_var;
  at::Tensor num_batches_tracked;

 protected:
  /// A buffer that keeps its value and dtype whatever the layer is cast to.
  struct KeptBuffer {
    at::Tensor* buffer;
    at::ScalarType dtype;
  };

  /// The layer's options, in the terms of Momentum BatchNorm. `momentum` is the weight of the batch in the update,
  /// where the state does not hold it.
  virtual MomentumBatchNormOptions configuration() const = 0;
  /// The buffers of a layer that tracks, in the operators' order.
  virtual std::vector<at::Tensor> state() const;
  /// Names of the buffers that a plain BatchNorm does not have.
  virtual std::vector<std::string> own_buffers() const { return {}; }
  virtual void register_own_state(torch::nn::Module& /*module*/) {}
  virtual std::vector<KeptBuffer> kept_buffers();
  /// Called after an archive was read. @param plain  whether it was a plain BatchNorm's, without own_buffers()
  virtual void after_load(bool /*plain*/) {}

  /// @throws c10::ValueError on a value out of range, or a group that this process does not belong to
  static void check(const MomentumBatchNormOptions& configuration);
  void register_state(torch::nn::Module& module);
  void load_state(torch::nn::Module& module, torch::serialize::InputArchive& archive);
  at::Tensor forward_checked(const at::Tensor& x, const at::Tensor& residual, size_t dimensions, bool training);
  /// Runs `cast`, which may cast every buffer, and gives the kept ones their values and dtypes back.
  void keep_precision_while(std::optional<c10::Device> target, const std::function<void()>& cast);
  /// Prints activation, inplace and process_group where they are not the defaults.
  void print_extensions(std::ostream& stream) const;
};

/// The torch module of a layer for inputs of one rank.
/// @tparam D      spatial dimensions plus one: 1 for (N, C) and (N, C, L), 2 for (N, C, H, W), 3 for (N, C, D, H, W)
/// @tparam Layer  a `NormLayer` with its `Options`
template <size_t D, typename Layer, typename Derived>
class NormLayerImpl : public torch::nn::Cloneable<Derived>, public Layer {
 public:
  explicit NormLayerImpl(const Layer::Options& options) : Layer(options) {
    // NOLINTNEXTLINE(clang-analyzer-optin.cplusplus.VirtualCall): as torch's own modules do
    reset();
  }

  /// @param x         (N, C, ...) of the layer's rank
  /// @param residual  undefined, or of x's shape and dtype: added before the activation
  /// @return y of x's shape and dtype, in x's suggested memory format
  /// @throws c10::ValueError, c10::TypeError  naming the argument; the state is then as it was
  at::Tensor forward(const at::Tensor& x, const at::Tensor& residual = {}) {
    return this->forward_checked(x, residual, D, this->is_training());
  }

  void reset() override { this->register_state(*this); }
  void pretty_print(std::ostream& stream) const override { this->print(stream, D); }
  /// Accepts also the archive of a plain BatchNorm. Everything is read before anything is changed.
  void load(torch::serialize::InputArchive& archive) override { this->load_state(*this, archive); }
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override {
    this->keep_precision_while(device, [&] { torch::nn::Module::to(device, dtype, non_blocking); });
  }
  void to(torch::Dtype dtype, bool non_blocking = false) override {
    this->keep_precision_while(std::nullopt, [&] { torch::nn::Module::to(dtype, non_blocking); });
  }
  void to(torch::Device device, bool non_blocking = false) override {
    this->keep_precision_while(device, [&] { torch::nn::Module::to(device, non_blocking); });
  }

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(at::Tensor())})
};

}  // namespace momentum_bn
