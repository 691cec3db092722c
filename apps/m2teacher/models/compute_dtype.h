#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>

#include <optional>

namespace m2teacher {

/// What convolutions and linear layers compute in while it lives, in this thread; otherwise in that of their inputs. As
/// torch's autocast has it: inputs and weights are cast, and gradients of the weights come back in the weights' own
/// dtype. Unlike autocast it is the same on every device, so that a dry run has the dtypes of the real one.
class ComputeDtype {
 public:
  /// @param dtype  unset: that of the inputs
  explicit ComputeDtype(std::optional<at::ScalarType> dtype);
  ~ComputeDtype();
  ComputeDtype(const ComputeDtype&) = delete;
  ComputeDtype& operator=(const ComputeDtype&) = delete;

 private:
  std::optional<at::ScalarType> before_;
};

/// @param x  (N, C, H, W)
at::Tensor convolve(const torch::nn::Conv2d& layer, const at::Tensor& x);
/// @param x  (N, C)
at::Tensor multiply(const torch::nn::Linear& layer, const at::Tensor& x);

}  // namespace m2teacher
