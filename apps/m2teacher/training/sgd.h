#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <map>
#include <string>
#include <vector>

namespace m2teacher {

/// Stochastic gradient descent with momentum, all parameters in one fused call.
/// Weight decay leaves biases and normalisation alone, that is every parameter of one dimension.
class Sgd {
 public:
  Sgd(const torch::nn::Module& module, double momentum, double weight_decay);

  /// Takes a step along the gradients and drops them.
  void step(double learning_rate);

  /// By the names of their parameters.
  std::map<std::string, at::Tensor> velocities() const;

 private:
  struct Group {
    std::vector<std::string> names;
    std::vector<at::Tensor> parameters;
    std::vector<at::Tensor> velocities;
    double weight_decay = 0;
  };

  Group decayed_;
  Group undecayed_;
  double momentum_;
};

}  // namespace m2teacher
