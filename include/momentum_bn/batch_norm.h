#pragma once

#include <momentum_bn/norm_layer.h>

#include <torch/nn/pimpl.h>

namespace momentum_bn {

/// Options for `BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d`: torch's, and what is fused.
///
///     BatchNorm2d bn(BatchNormOptions(64).activation(Activation::ReLU));
struct MOMENTUM_BN_API BatchNormOptions {
  /* implicit */ BatchNormOptions(int64_t num_features) : num_features_(num_features) {}

  /// Number of channels C of the input. Must be at least 0, as in torch.
  TORCH_ARG(int64_t, num_features);
  /// Added to the variance under the square root. Must be positive and finite.
  TORCH_ARG(double, eps) = 1e-5;
  /// Weight of the new batch in the running statistics, in [0, 1]; nullopt: cumulative average.
  TORCH_ARG(std::optional<double>, momentum) = 0.1;
  /// Whether there is a weight (and, see `bias`, a bias) to learn.
  TORCH_ARG(bool, affine) = true;
  /// false: no buffers; batch statistics alone, in training and in evaluation.
  TORCH_ARG(bool, track_running_stats) = true;
  TORCH_ARG(Activation, activation) = Activation::None;
  /// The caller's promise that nobody reads the input afterwards: the output takes its memory where no gradient is
  /// recorded, and in evaluation where `weight` takes none.
  TORCH_ARG(bool, inplace) = false;
  /// Name of a c10d process group, as in `MomentumBatchNormOptions`: torch's SyncBatchNorm. One all_gather per training
  /// forward, one all_reduce in its backward pass.
  TORCH_ARG(std::optional<std::string>, process_group) = std::nullopt;
  /// false: an affine layer without a bias.
  TORCH_ARG(bool, bias) = true;
  TORCH_ARG(std::optional<c10::Device>, device) = std::nullopt;
  TORCH_ARG(std::optional<c10::ScalarType>, dtype) = std::nullopt;
};

/// torch's BatchNorm, in its numbers, errors and archive, with an activation and a residual in its own passes.
/// Gradients flow through the batch statistics (Ioffe, Szegedy 2015, arXiv 1502.03167).
///
/// State, as torch's: weight and bias (C), running_mean and running_var (C), num_batches_tracked (), int64 whatever the
/// layer is cast to.
class MOMENTUM_BN_API BatchNormLayer : public NormLayer {
 public:
  using Options = BatchNormOptions;
  /// @throws c10::ValueError on an option out of range
  explicit BatchNormLayer(const BatchNormOptions& options);

  BatchNormOptions options;

 protected:
  MomentumBatchNormOptions configuration() const override;
  void print(std::ostream& stream, size_t dimensions) const;
};

/// BatchNorm over (N, C) or (N, C, L). See `BatchNormLayer` and `BatchNormOptions`.
class MOMENTUM_BN_API BatchNorm1dImpl : public NormLayerImpl<1, BatchNormLayer, BatchNorm1dImpl> {
 public:
  using NormLayerImpl::NormLayerImpl;
};
TORCH_MODULE(BatchNorm1d);

/// BatchNorm over (N, C, H, W). See `BatchNormLayer` and `BatchNormOptions`.
class MOMENTUM_BN_API BatchNorm2dImpl : public NormLayerImpl<2, BatchNormLayer, BatchNorm2dImpl> {
 public:
  using NormLayerImpl::NormLayerImpl;
};
TORCH_MODULE(BatchNorm2d);

/// BatchNorm over (N, C, D, H, W). See `BatchNormLayer` and `BatchNormOptions`.
class MOMENTUM_BN_API BatchNorm3dImpl : public NormLayerImpl<3, BatchNormLayer, BatchNorm3dImpl> {
 public:
  using NormLayerImpl::NormLayerImpl;
};
TORCH_MODULE(BatchNorm3d);

}  // namespace momentum_bn
