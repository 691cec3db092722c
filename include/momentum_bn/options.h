#pragma once

#include <momentum_bn/export.h>
#include <momentum_bn/variance.h>
#include <torch/arg.h>

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>

namespace momentum_bn {

/// How the weight of the batch in the blend moves from update to update.
enum class Schedule {
  Cosine,    ///< (cos(pi * min(cur_iter, total_iters) / total_iters) + 1) / 2, arXiv 2101.07525
  Constant,  ///< stays where it is; only cur_iter advances
};

/// Applied to the output in the same pass, after the residual was added.
enum class Activation { None, ReLU };

/// The words that Python and the operators use for the enumerators ("cosine", "published", "relu", ...).
MOMENTUM_BN_API const char* to_word(Schedule schedule);
MOMENTUM_BN_API const char* to_word(Variance variance);
/// No word (nullopt) stands for `Activation::None`.
MOMENTUM_BN_API std::optional<std::string> to_word(Activation activation);

/// Options for `MomentumBatchNorm1d`, `MomentumBatchNorm2d` and `MomentumBatchNorm3d`.
///
///     MomentumBatchNorm2d bn(MomentumBatchNormOptions(64).total_iters(10'000).activation(Activation::ReLU));
struct MOMENTUM_BN_API MomentumBatchNormOptions {
  /* implicit */ MomentumBatchNormOptions(int64_t num_features) : num_features_(num_features) {}

  /// Number of channels C of the input. Must be at least 0, as in torch.
  TORCH_ARG(int64_t, num_features);
  /// Added to the variance under the square root. Must be positive and finite.
  TORCH_ARG(double, eps) = 1e-5;
  /// Weight of the new batch in the blend until the schedule first moves it, towards 0; in [0, 1];
  /// nullopt: cumulative average, weight 1 / (cur_iter + 1), no schedule. (A teacher's `param_momentum` is the weight
  /// of its old parameters.)
  TORCH_ARG(std::optional<double>, momentum) = 1.0;
  /// Whether there is a weight (and, see `bias`, a bias) to learn.
  TORCH_ARG(bool, affine) = true;
  /// false: no buffers; batch statistics alone, in training and in evaluation.
  TORCH_ARG(bool, track_running_stats) = true;
  /// Updates after which the batch has no weight left (momentum 0). At least 1.
  TORCH_ARG(int64_t, total_iters) = 100;
  /// Training forwards per update of the running statistics: 2 in the paper (two views per step). At least 1.
  TORCH_ARG(int64_t, views_per_update) = 2;
  TORCH_ARG(Schedule, schedule) = Schedule::Cosine;
  TORCH_ARG(Variance, variance) = Variance::Published;
  TORCH_ARG(Activation, activation) = Activation::None;
  /// The caller's promise that nobody reads the input afterwards, as with torch's ReLU in place: the output takes its
  /// memory wherever no enabled gradient needs the input again. A network that reads it again gets a wrong result.
  TORCH_ARG(bool, inplace) = false;
  /// Name of a c10d process group that this process belongs to (`c10d::ProcessGroup::getGroupName()`; Python:
  /// `group.group_name`): in training the batch statistics are those of all its ranks' values together, n their number.
  /// One all_gather per training forward, none in backward or evaluation. All ranks must run the same training
  /// forwards. nullopt: this process alone.
  TORCH_ARG(std::optional<std::string>, process_group) = std::nullopt;
  /// false: gradients flow through the batch's share of the statistics, as in torch's BatchNorm; with a `process_group`
  /// that takes one all_reduce in the backward pass.
  TORCH_ARG(bool, detach_statistics) = true;
  /// false: an affine layer without a bias.
  TORCH_ARG(bool, bias) = true;
  TORCH_ARG(std::optional<c10::Device>, device) = std::nullopt;
  TORCH_ARG(std::optional<c10::ScalarType>, dtype) = std::nullopt;
};

}  // namespace momentum_bn
