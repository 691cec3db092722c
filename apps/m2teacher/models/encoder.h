#pragma once

#include "models/encoder_options.h"
#include "models/normalisation.h"

#include <torch/nn/modules/conv.h>
#include <torch/nn/pimpl.h>

#include <vector>

namespace m2teacher {

/// Two 3x3 convolutions around a shortcut (arXiv 1512.03385), under torchvision's names.
class BasicBlockImpl : public torch::nn::Module {
 public:
  BasicBlockImpl(int64_t in_channels, int64_t out_channels, int64_t stride, const NormFactory& norm);
  at::Tensor forward(const at::Tensor& x);

 private:
  torch::nn::Conv2d conv1_{nullptr};
  std::unique_ptr<Norm> bn1_;
  torch::nn::Conv2d conv2_{nullptr};
  std::unique_ptr<Norm> bn2_;
  torch::nn::Conv2d downsample_conv_{nullptr};
  std::unique_ptr<Norm> downsample_bn_;
};
TORCH_MODULE(BasicBlock);

/// A small residual network for small images: a 3x3 stem of stride 2, one block per stage, average pool to a coarse
/// grid.
class EncoderImpl : public torch::nn::Module {
 public:
  EncoderImpl(const EncoderOptions& options, const NormFactory& norm);

  /// @param images  (N, C, H, W), standardised
  /// @return (N, options.features())
  at::Tensor forward(const at::Tensor& images);

 private:
  torch::nn::Conv2d conv1_{nullptr};
  std::unique_ptr<Norm> bn1_;
  std::vector<BasicBlock> blocks_;
  int64_t pool_;
};
TORCH_MODULE(Encoder);

}  // namespace m2teacher
