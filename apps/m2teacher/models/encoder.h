#pragma once

#include "models/encoder_options.h"
#include "models/normalisation.h"

#include <torch/nn/modules/conv.h>
#include <torch/nn/pimpl.h>

#include <memory>
#include <vector>

namespace m2teacher {

/// A residual block (arXiv 1512.03385) under torchvision's names: convolutions "conv1", "conv2", ... each followed by
/// its normalisation "bn1", "bn2", ..., around a shortcut, which is convolved and normalised ("downsample.0",
/// "downsample.1") where the block changes sizes.
class ResidualBlockImpl : public torch::nn::Module {
 public:
  struct Layer {
    int64_t out_channels;
    int64_t kernel;
    int64_t stride;
  };

  ResidualBlockImpl(int64_t in_channels, const std::vector<Layer>& layers, const NormFactory& norm);
  at::Tensor forward(const at::Tensor& x);

 private:
  std::vector<torch::nn::Conv2d> convolutions_;
  std::vector<std::unique_ptr<Norm>> norms_;
  torch::nn::Conv2d downsample_conv_{nullptr};
  std::unique_ptr<Norm> downsample_bn_;
};
TORCH_MODULE(ResidualBlock);

/// A residual network without its classifier, under torchvision's names, in channels last.
///
/// The small one has a 3x3 stem of stride 2, one basic block per stage, and averages its last stage to a coarse grid.
class EncoderImpl : public torch::nn::Module {
 public:
  EncoderImpl(const EncoderOptions& options, const NormFactory& norm);

  /// @param images  (N, C, H, W), standardised
  /// @return (N, options.features())
  at::Tensor forward(const at::Tensor& images);

 private:
  void add_stage(int64_t number, int64_t& channels, int64_t blocks, int64_t width, int64_t stride,
                 const NormFactory& norm);

  EncoderOptions options_;
  bool max_pool_;
  int64_t pool_;
  torch::nn::Conv2d conv1_{nullptr};
  std::unique_ptr<Norm> bn1_;
  std::vector<ResidualBlock> blocks_;
};
TORCH_MODULE(Encoder);

}  // namespace m2teacher
