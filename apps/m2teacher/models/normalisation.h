#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>

namespace m2teacher {

/// Normalisation and what follows it: y = activation(norm(x) + residual).
class Norm {
 public:
  virtual ~Norm() = default;

  /// @param x         (N, C) or (N, C, H, W); may be overwritten
  /// @param residual  undefined, or of x's shape
  virtual at::Tensor forward(const at::Tensor& x, const at::Tensor& residual) = 0;
  at::Tensor forward(const at::Tensor& x) { return forward(x, {}); }
};

struct NormOptions {
  int64_t channels;
  bool spatial;  ///< input (N, C, H, W); otherwise (N, C)
  bool relu;     ///< followed by ReLU
};

/// Makes a normalisation and registers its module in `parent` under `name`.
using NormFactory = std::function<std::unique_ptr<Norm>(torch::nn::Module& parent, const std::string& name,
                                                        const NormOptions& options)>;

/// torch's BatchNorm: for every encoder that is only evaluated, and for comparison.
NormFactory batch_norm();

/// This library's BatchNorm with fused residual and ReLU: for the student. Its numbers and names are torch's.
NormFactory fused_batch_norm();

/// BatchNorm that normalises by its running statistics in training, too, and leaves them alone: somebody else writes
/// them.
NormFactory evaluated_batch_norm();

/// Momentum BatchNorm with fused residual and ReLU, in place: for the teacher.
/// @param process_group     name of the c10d group whose statistics it takes; unset: this process's
/// @param views_per_update  forwards of a training step
NormFactory momentum_batch_norm(const std::optional<std::string>& process_group = std::nullopt,
                                int64_t views_per_update = 2);

}  // namespace m2teacher
