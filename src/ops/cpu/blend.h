#pragma once

#include "kernels/cpu/kernels.h"
#include "ops/config.h"
#include "ops/kernel_arguments.h"
#include "ops/ops.h"
#include "ops/state.h"

#include <ATen/core/Tensor.h>

#include <memory>

// The kernels' arrays of channels: from tensors of any floating dtype, and back.

namespace momentum_bn::cpu {

/// cur_iter += 1 and the momentum that belongs to it.
void advance_schedule(at::Tensor& cur_iter, at::Tensor& momentum, int64_t total_iters, Schedule schedule);

/// Uninitialised memory for `size` doubles. Each thread keeps what its last call used, up to kKept, for the next one:
/// as much as some thousand channels take, the system would map and unmap at each call.
class Doubles {
 public:
  explicit Doubles(int64_t size);
  ~Doubles();
  Doubles(const Doubles&) = delete;
  Doubles& operator=(const Doubles&) = delete;

  double* get() { return memory_.get(); }

 private:
  struct Memory {
    std::unique_ptr<double[]> doubles;
    int64_t size = 0;
  };
  static constexpr int64_t kKept = int64_t{64} * 1024;
  static Memory& kept();

  std::unique_ptr<double[]> memory_;
  int64_t size_;
};

/// What all forward passes share: statistics in, coefficients out.
class ChannelBlend {
 public:
  /// @param values_per_channel  of all that the statistics are taken over
  ChannelBlend(const at::Tensor& x, double values_per_channel, const ops::MaybeTensor& weight,
               const ops::MaybeTensor& bias, const at::Tensor& saved, double eps, Variance variance);
  ChannelBlend(const ChannelBlend&) = delete;
  ChannelBlend& operator=(const ChannelBlend&) = delete;

  void attach(kernels::ForwardArgs& args);

 protected:
  kernels::BlendArgs args_ = {};
  at::ScalarType accumulate_;

 private:
  ChannelInput weight_;
  ChannelInput bias_;
  Doubles numbers_;
};

/// Blends with the state and takes the batch into it.
class StateBlend : public ChannelBlend {
 public:
  StateBlend(const at::Tensor& x, double values_per_channel, const ops::MaybeTensor& weight,
             const ops::MaybeTensor& bias, const at::Tensor& saved, State& state, const Config& config);
  /// Counts the forward; to be called once all channels are done.
  void finish();

 private:
  State& state_;
  const Config& config_;
  ChannelOutput running_mean_;
  ChannelOutput running_var_;
  ChannelOutput view_mean_sum_;
  ChannelOutput view_var_sum_;
};

struct FunctionalOptions {
  double momentum;
  double eps;
  Variance variance;
};

/// Blends with statistics that stay as they are and tells those of the batch.
class FunctionalBlend : public ChannelBlend {
 public:
  FunctionalBlend(const at::Tensor& x, const ops::MaybeTensor& weight, const ops::MaybeTensor& bias,
                  const at::Tensor& saved, const ops::MaybeTensor& running_mean, const ops::MaybeTensor& running_var,
                  const FunctionalOptions& options, const at::Tensor& b_mean, const at::Tensor& b_var);

 private:
  ChannelInput running_mean_;
  ChannelInput running_var_;
};

/// What the backward kernel needs of `saved` and weight, and what becomes of its sums.
class BackwardCoefficients {
 public:
  BackwardCoefficients(const at::Tensor& saved, const ops::MaybeTensor& weight);
  void attach(kernels::BackwardArgs& args);
  void write_dweight(const at::Tensor& dweight);
  void write_dbias(const at::Tensor& dbias);

 private:
  template <typename A>
  void fill(const A* weight);

  at::Tensor saved_;
  int64_t channels_;
  Doubles numbers_;  // scale, center, each in the accumulate type; sum_g, sum_gx
};

}  // namespace momentum_bn::cpu
