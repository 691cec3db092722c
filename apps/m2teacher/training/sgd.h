#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace m2teacher {

/// Stochastic gradient descent with momentum, all parameters in one fused call.
/// Weight decay leaves biases and normalisation alone, that is every parameter of one dimension.
///
/// With a trust coefficient it is LARS (arXiv 1708.03888), as BYOL has it (arXiv 2006.07733, appendix J): the gradient
/// of each parameter that decays, decay included, is scaled to the parameter's norm times the coefficient.
class Sgd {
 public:
  /// @param trust_coefficient  unset: plain SGD
  Sgd(const torch::nn::Module& module, double momentum, double weight_decay,
      std::optional<double> trust_coefficient = std::nullopt);

  /// Takes a step along the gradients and drops them.
  void step(double learning_rate) { step(learning_rate, 0, 1); }
  /// For part `part` of `parts`, of about the same number of values each; different parts at the same time if need be.
  void step(double learning_rate, int64_t part, int64_t parts);

  /// By the names of their parameters.
  std::map<std::string, at::Tensor> velocities() const;

 private:
  struct Group {
    std::vector<std::string> names;
    std::vector<at::Tensor> parameters;
    std::vector<at::Tensor> velocities;
    double weight_decay = 0;
    std::optional<double> trust_coefficient;
  };

  /// Entries of the group whose values lie in that part of all its values.
  static std::pair<size_t, size_t> entries(const Group& group, int64_t part, int64_t parts);

  Group decayed_;
  Group undecayed_;
  double momentum_;
};

}  // namespace m2teacher
