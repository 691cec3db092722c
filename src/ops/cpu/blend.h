#pragma once

#include "kernels/cpu/kernels.h"
#include "ops/config.h"
#include "ops/ops.h"
#include "ops/state.h"

#include <ATen/core/Tensor.h>

#include <memory>

// What lies between the two reads of the values: from a channel's batch statistics to the numbers it is normalised
// with, and to the state.

namespace momentum_bn::cpu {

/// cur_iter += 1 and the momentum that belongs to it.
void advance_schedule(at::Tensor& cur_iter, at::Tensor& momentum, int64_t total_iters, Schedule schedule);

/// Values (C) of any floating dtype, read and written as doubles.
class ChannelValues {
 public:
  ChannelValues() = default;
  /// Undefined: nothing to read. Otherwise the tensor must outlive this.
  explicit ChannelValues(const at::Tensor& values);

  bool defined() const { return data_ != nullptr; }
  double operator[](int64_t channel) const;
  void set(int64_t channel, double value) const;

 private:
  void* data_ = nullptr;
  int64_t stride_ = 0;
  at::ScalarType dtype_ = at::kFloat;
};

/// The part that all forward passes share: buffers for the kernels, and mean and variance to center, scale and shift.
class ChannelBlend {
 public:
  ChannelBlend(const at::Tensor& x, const ops::MaybeTensor& weight, const ops::MaybeTensor& bias,
               const at::Tensor& saved, double eps);
  virtual ~ChannelBlend() = default;
  ChannelBlend(const ChannelBlend&) = delete;
  ChannelBlend& operator=(const ChannelBlend&) = delete;

  void attach(kernels::ForwardArgs& args);

 protected:
  /// The mean and variance to normalise channel with, from its batch mean and unbiased batch variance.
  virtual void blend(int64_t channel, double& mean, double& var) = 0;
  double n() const { return n_; }

 private:
  template <typename A>
  void run(int64_t begin, int64_t end);

  double n_;
  double eps_;
  int64_t channels_;
  bool in_double_;
  ChannelValues weight_;
  ChannelValues bias_;
  at::Tensor saved_;
  std::unique_ptr<double[]> statistics_;    // mean, m2
  std::unique_ptr<double[]> coefficients_;  // center, scale, shift, each in the accumulate type
};

/// Blends with the state and takes the batch into it.
class StateBlend : public ChannelBlend {
 public:
  StateBlend(const at::Tensor& x, const ops::MaybeTensor& weight, const ops::MaybeTensor& bias, const at::Tensor& saved,
             State& state, const Config& config);
  /// Counts the forward; to be called once all channels are done.
  void finish();

 protected:
  void blend(int64_t channel, double& mean, double& var) override;

 private:
  State& state_;
  const Config& config_;
  double momentum_ = 1;
  int64_t views_ = 1;
  bool completes_ = false;
  ChannelValues running_mean_;
  ChannelValues running_var_;
  ChannelValues view_mean_sum_;
  ChannelValues view_var_sum_;
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

 protected:
  void blend(int64_t channel, double& mean, double& var) override;

 private:
  FunctionalOptions options_;
  ChannelValues running_mean_;
  ChannelValues running_var_;
  ChannelValues b_mean_;
  ChannelValues b_var_;
};

/// What the backward kernel needs of `saved` and weight, and what becomes of its sums.
class BackwardCoefficients {
 public:
  BackwardCoefficients(const at::Tensor& saved, const ops::MaybeTensor& weight);
  void attach(kernels::BackwardArgs& args);
  void write_dweight(const at::Tensor& dweight) const;
  void write_dbias(const at::Tensor& dbias) const;

 private:
  at::Tensor saved_;
  int64_t channels_;
  at::Tensor scale_;
  at::Tensor center_;
  std::unique_ptr<double[]> sums_;  // sum_g, sum_gx
};

}  // namespace momentum_bn::cpu
