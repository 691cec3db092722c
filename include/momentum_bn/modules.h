#pragma once

#include <momentum_bn/options.h>

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/pimpl.h>
#include <torch/ordered_dict.h>

#include <functional>
#include <ostream>

namespace momentum_bn {

/// What the three Momentum BatchNorm layers share: options, parameters, state and the forward pass.
///
/// State, under the names it has in `named_buffers()`, in archives and in Python's `state_dict()`:
///
/// | name                | shape | dtype         | meaning                                                            |
/// | ------------------- | ----- | ------------- | ------------------------------------------------------------------ |
/// | running_mean        | (C)   | as the layer  | running mean                                                       |
/// | running_var         | (C)   | as the layer  | running variance                                                   |
/// | num_batches_tracked | ()    | int64         | training forwards so far                                           |
/// | view_mean_sum       | (C)   | float32 up    | sum of the batch means of the views since the last update          |
/// | view_var_sum        | (C)   | float32 up    | sum of their unbiased batch variances                              |
/// | view_count          | ()    | int64         | how many views these sums hold                                     |
/// | cur_iter_state      | ()    | int64         | updates so far                                                     |
/// | momentum_state      | ()    | float64       | current weight of the batch; -1: cumulative average (no momentum)  |
///
/// The four scalars keep their dtype whatever the layer is cast to; the sums are float32 in a layer of 16 bits.
class MOMENTUM_BN_API MomentumBatchNormLayer {
 public:
  explicit MomentumBatchNormLayer(const MomentumBatchNormOptions& options);
  virtual ~MomentumBatchNormLayer() = default;

  /// Weight of the batch in the blend; nullopt: cumulative average. Reads the state, so may wait for a GPU.
  std::optional<double> momentum() const;
  /// @throws c10::ValueError outside [0, 1]
  void set_momentum(std::optional<double> momentum);
  /// Updates of the running statistics so far. Reads the state, so may wait for a GPU.
  int64_t cur_iter() const;
  /// Leaves the momentum as it is. @throws c10::ValueError below 0
  void set_cur_iter(int64_t cur_iter);
  int64_t total_iters() const { return options.total_iters(); }
  /// @throws c10::ValueError below 1
  void set_total_iters(int64_t total_iters);
  /// cur_iter += 1 and the momentum that the schedule gives it. A training forward that completes an update calls this.
  void momentum_cosine_decay();
  /// Makes all of the state new: running statistics, views, cur_iter, and the momentum of the options.
  void reset_running_stats();
  /// Forgets the views, makes cur_iter 0 and the momentum that of the options; running statistics stay.
  void restart_schedule();
  /// reset_running_stats(), weight 1, bias 0.
  void reset_parameters();

  MomentumBatchNormOptions options;
  at::Tensor weight;
  at::Tensor bias;
  at::Tensor running_mean;
  at::Tensor running_var;
  at::Tensor num_batches_tracked;
  at::Tensor view_mean_sum;
  at::Tensor view_var_sum;
  at::Tensor view_count;
  at::Tensor cur_iter_state;
  at::Tensor momentum_state;

 protected:
  at::Tensor forward_checked(const at::Tensor& x, const at::Tensor& residual, bool training);
  void register_state(torch::nn::Module& module);
  void load_state(torch::nn::Module& module, torch::serialize::InputArchive& archive);
  void pretty_print_as(std::ostream& stream, const char* name) const;
  /// Runs `cast`, which may cast every buffer, and gives the schedule, the counters and the sums of the views their own
  /// dtypes back.
  void keep_precision_while(std::optional<c10::Device> target, const std::function<void()>& cast);

 private:
  // Where the layer does not track: plain values, as there are no buffers.
  std::optional<double> untracked_momentum_;
  int64_t untracked_cur_iter_ = 0;
};

/// @tparam D spatial dimensions plus one: 1 for (N, C) and (N, C, L), 2 for (N, C, H, W), 3 for (N, C, D, H, W)
template <size_t D, typename Derived>
class MOMENTUM_BN_API MomentumBatchNormImplBase : public torch::nn::Cloneable<Derived>, public MomentumBatchNormLayer {
 public:
  explicit MomentumBatchNormImplBase(const MomentumBatchNormOptions& options);

  /// @param x         (N, C, ...) of the layer's rank
  /// @param residual  undefined, or of x's shape and dtype: added before the activation
  /// @return y of x's shape and dtype, in x's suggested memory format
  /// @throws c10::ValueError, c10::TypeError  naming the argument; the state is then as it was
  at::Tensor forward(const at::Tensor& x, const at::Tensor& residual = {});

  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  /// Accepts also the archive of a plain BatchNorm: the schedule then stays, remembered views are dropped.
  void load(torch::serialize::InputArchive& archive) override;
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(at::Tensor())})
};

/// Momentum BatchNorm over (N, C) or (N, C, L). See `MomentumBatchNormLayer` and `MomentumBatchNormOptions`.
class MOMENTUM_BN_API MomentumBatchNorm1dImpl : public MomentumBatchNormImplBase<1, MomentumBatchNorm1dImpl> {
 public:
  using MomentumBatchNormImplBase::MomentumBatchNormImplBase;
};
TORCH_MODULE(MomentumBatchNorm1d);

/// Momentum BatchNorm over (N, C, H, W). See `MomentumBatchNormLayer` and `MomentumBatchNormOptions`.
class MOMENTUM_BN_API MomentumBatchNorm2dImpl : public MomentumBatchNormImplBase<2, MomentumBatchNorm2dImpl> {
 public:
  using MomentumBatchNormImplBase::MomentumBatchNormImplBase;
};
TORCH_MODULE(MomentumBatchNorm2d);

/// Momentum BatchNorm over (N, C, D, H, W). See `MomentumBatchNormLayer` and `MomentumBatchNormOptions`.
class MOMENTUM_BN_API MomentumBatchNorm3dImpl : public MomentumBatchNormImplBase<3, MomentumBatchNorm3dImpl> {
 public:
  using MomentumBatchNormImplBase::MomentumBatchNormImplBase;
};
TORCH_MODULE(MomentumBatchNorm3d);

/// Sets `total_iters` of every Momentum BatchNorm and every teacher in `module`, itself included.
/// @throws c10::ValueError below 1
MOMENTUM_BN_API void set_total_iters(torch::nn::Module& module, int64_t total_iters);

/// Parameters and buffers of `module` by name, without what a plain BatchNorm does not have: loads into the same
/// network built with torch's BatchNorm. The tensors are the module's own, not copies.
MOMENTUM_BN_API torch::OrderedDict<std::string, at::Tensor> plain_state_dict(const torch::nn::Module& module);

}  // namespace momentum_bn
