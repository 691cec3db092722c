#pragma once

#include <momentum_bn/norm_layer.h>

#include <torch/nn/pimpl.h>
#include <torch/ordered_dict.h>

namespace momentum_bn {

/// What the three Momentum BatchNorm layers share beyond `NormLayer`: the schedule and the views.
///
/// State, under the names it has in `named_buffers()`, in archives and in Python's `state_dict()`:
///
/// | name                | shape | dtype         | meaning                                                            |
/// | ------------------- | ----- | ------------- | ------------------------------------------------------------------ |
/// | running_mean        | (C)   | as the layer  | running mean                                                       |
/// | running_var         | (C)   | as the layer  | running variance                                                   |
/// | num_batches_tracked | ()    | int64         | training forwards so far                                           |
/// | view_mean_sum       | (C)   | see below     | sum of the batch means of the views since the last update          |
/// | view_var_sum        | (C)   | see below     | sum of their unbiased batch variances                              |
/// | view_count          | ()    | int64         | how many views these sums hold                                     |
/// | cur_iter_state      | ()    | int64         | updates so far                                                     |
/// | momentum_state      | ()    | float64       | current weight of the batch; -1: cumulative average (no momentum)  |
///
/// The four scalars keep their dtype whatever the layer is cast to. The sums have the layer's dtype, but float32 in a
/// layer of 16 bits.
class MOMENTUM_BN_API MomentumBatchNormLayer : public NormLayer {
 public:
  using Options = MomentumBatchNormOptions;
  /// @throws c10::ValueError on an option out of range
  explicit MomentumBatchNormLayer(const MomentumBatchNormOptions& options);

  /// Weight of the batch in the blend; nullopt: cumulative average. Reads the state, so may wait for a GPU.
  std::optional<double> momentum() const;
  /// @throws c10::ValueError outside [0, 1]
  void set_momentum(std::optional<double> momentum);
  /// Updates of the running statistics so far. Reads the state, so may wait for a GPU.
  int64_t cur_iter() const;
  /// Sets cur_iter and leaves the momentum as it is. @throws c10::ValueError below 0
  void set_cur_iter(int64_t cur_iter);
  int64_t total_iters() const { return options.total_iters(); }
  /// @throws c10::ValueError below 1
  void set_total_iters(int64_t total_iters);
  /// Adds 1 to cur_iter and sets the momentum that the schedule has there. A training forward that completes an update
  /// does this by itself.
  void momentum_cosine_decay();
  /// Makes all of the state new: running statistics, views, cur_iter, and the momentum of the options.
  void reset_running_stats() override;
  /// Forgets the views, makes cur_iter 0 and the momentum that of the options; running statistics stay.
  void restart_schedule();

  MomentumBatchNormOptions options;
  at::Tensor view_mean_sum;
  at::Tensor view_var_sum;
  at::Tensor view_count;
  at::Tensor cur_iter_state;
  at::Tensor momentum_state;

 protected:
  MomentumBatchNormOptions configuration() const override { return options; }
  std::vector<at::Tensor> state() const override;
  std::vector<std::string> own_buffers() const override;
  void register_own_state(torch::nn::Module& module) override;
  std::vector<KeptBuffer> kept_buffers() override;
  /// A plain BatchNorm's archive leaves the schedule where it is; remembered views are dropped.
  void after_load(bool plain) override;
  void print(std::ostream& stream, size_t dimensions) const;

 private:
  void forget_views();

  // A layer that does not track running statistics has these plain values, as it has no buffers.
  std::optional<double> untracked_momentum_;
  int64_t untracked_cur_iter_ = 0;
};

/// Momentum BatchNorm over (N, C) or (N, C, L). See `MomentumBatchNormLayer` and `MomentumBatchNormOptions`.
class MOMENTUM_BN_API MomentumBatchNorm1dImpl
    : public NormLayerImpl<1, MomentumBatchNormLayer, MomentumBatchNorm1dImpl> {
 public:
  using NormLayerImpl::NormLayerImpl;
};
TORCH_MODULE(MomentumBatchNorm1d);

/// Momentum BatchNorm over (N, C, H, W). See `MomentumBatchNormLayer` and `MomentumBatchNormOptions`.
class MOMENTUM_BN_API MomentumBatchNorm2dImpl
    : public NormLayerImpl<2, MomentumBatchNormLayer, MomentumBatchNorm2dImpl> {
 public:
  using NormLayerImpl::NormLayerImpl;
};
TORCH_MODULE(MomentumBatchNorm2d);

/// Momentum BatchNorm over (N, C, D, H, W). See `MomentumBatchNormLayer` and `MomentumBatchNormOptions`.
class MOMENTUM_BN_API MomentumBatchNorm3dImpl
    : public NormLayerImpl<3, MomentumBatchNormLayer, MomentumBatchNorm3dImpl> {
 public:
  using NormLayerImpl::NormLayerImpl;
};
TORCH_MODULE(MomentumBatchNorm3d);

/// Sets `total_iters` of every Momentum BatchNorm and every teacher in `module`, itself included.
/// @throws c10::ValueError below 1
MOMENTUM_BN_API void set_total_iters(torch::nn::Module& module, int64_t total_iters);

/// Parameters and buffers of `module` by name, without what a plain BatchNorm does not have: loads into the same
/// network built with torch's BatchNorm. The tensors are the module's own, not copies.
MOMENTUM_BN_API torch::OrderedDict<std::string, at::Tensor> plain_state_dict(const torch::nn::Module& module);

}  // namespace momentum_bn
