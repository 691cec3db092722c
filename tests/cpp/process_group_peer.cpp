// The C++ side of test_process_group.py: a layer in a process group that Python brought up.

#include <momentum_bn/modules.h>
#include <torch/library.h>

namespace {

/// Trains a layer on the inputs one after the other: their outputs, then the state in the order of the buffers, then
/// the weight's gradient of the sum of all outputs' squares.
std::vector<at::Tensor> train(const std::vector<at::Tensor>& inputs, std::string process_group) {
  const auto options = momentum_bn::MomentumBatchNormOptions(inputs.at(0).size(1))
                           .total_iters(4)
                           .dtype(inputs.at(0).scalar_type())
                           .process_group(std::move(process_group));
  momentum_bn::MomentumBatchNorm2d layer(options);
  std::vector<at::Tensor> results;
  for (const auto& x : inputs) {
    const auto y = layer->forward(x);
    y.square().sum().backward();
    results.push_back(y.detach());
  }
  for (const auto& buffer : layer->buffers()) {
    results.push_back(buffer);
  }
  results.push_back(layer->weight.grad());
  return results;
}

}  // namespace

TORCH_LIBRARY(momentum_bn_peer, m) { m.def("train(Tensor[] inputs, str process_group) -> Tensor[]", train); }
