#pragma once

#include "kernels/cpu/kernels.h"
#include "ops/config.h"
#include "ops/kernel_arguments.h"
#include "ops/ops.h"
#include "ops/state.h"

#include <ATen/core/Tensor.h>

// This file leads from a layer's tensors to what the kernels are told of the blend with running statistics, and back.

namespace momentum_bn::cpu {

/// Adds 1 to cur_iter and sets the momentum that belongs to it.
void advance_schedule(at::Tensor& cur_iter, at::Tensor& momentum, int64_t total_iters, Schedule schedule);

/// Blends with the state and takes the batch into it.
class StateBlend {
 public:
  /// @param values_per_channel  over all that the statistics are taken over
  StateBlend(double values_per_channel, at::ScalarType accumulate, State& state, const Config& config);
  StateBlend(const StateBlend&) = delete;
  StateBlend& operator=(const StateBlend&) = delete;

  const kernels::BlendArgs& args() const { return args_; }
  /// Counts the forward. Must be called once all channels are done.
  void finish();

 private:
  kernels::BlendArgs args_ = {};
  State& state_;
  const Config& config_;
  ChannelArray running_mean_;
  ChannelArray running_var_;
  ChannelArray view_mean_sum_;
  ChannelArray view_var_sum_;
};

struct FunctionalOptions {
  double momentum;
  double eps;
  Variance variance;
};

/// Blends with statistics that stay as they are and tells those of the batch.
class FunctionalBlend {
 public:
  FunctionalBlend(double values_per_channel, const ops::MaybeTensor& running_mean, const ops::MaybeTensor& running_var,
                  const FunctionalOptions& options, const at::Tensor& b_mean, const at::Tensor& b_var);
  FunctionalBlend(const FunctionalBlend&) = delete;
  FunctionalBlend& operator=(const FunctionalBlend&) = delete;

  const kernels::BlendArgs& args() const { return args_; }

 private:
  kernels::BlendArgs args_ = {};
  ChannelArray running_mean_;
  ChannelArray running_var_;
};

}  // namespace momentum_bn::cpu
