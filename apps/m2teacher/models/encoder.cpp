#include "models/encoder.h"

#include <ATen/ops/adaptive_avg_pool2d.h>
#include <torch/nn/init.h>
#include <torch/nn/modules/container/modulelist.h>

namespace m2teacher {
namespace {

constexpr int64_t kStemStride = 2;

torch::nn::Conv2d conv(int64_t in_channels, int64_t out_channels, int64_t kernel, int64_t stride) {
  torch::nn::Conv2d made(
      torch::nn::Conv2dOptions(in_channels, out_channels, kernel).stride(stride).padding((kernel - 1) / 2).bias(false));
  torch::nn::init::kaiming_normal_(made->weight, /*a=*/0, torch::kFanOut, torch::kReLU);
  // The layout of the weight decides that of the output; the input's says nothing where it has one channel.
  made->weight.set_data(made->weight.contiguous(at::MemoryFormat::ChannelsLast));
  return made;
}

}  // namespace

BasicBlockImpl::BasicBlockImpl(int64_t in_channels, int64_t out_channels, int64_t stride, const NormFactory& norm) {
  conv1_ = register_module("conv1", conv(in_channels, out_channels, 3, stride));
  bn1_ = norm(*this, "bn1", {.channels = out_channels, .spatial = true, .relu = true});
  conv2_ = register_module("conv2", conv(out_channels, out_channels, 3, 1));
  bn2_ = norm(*this, "bn2", {.channels = out_channels, .spatial = true, .relu = true});
  if (stride != 1 || in_channels != out_channels) {
    const auto downsample = register_module("downsample", std::make_shared<torch::nn::ModuleListImpl>());
    downsample_conv_ = downsample->register_module("0", conv(in_channels, out_channels, 1, stride));
    downsample_bn_ = norm(*downsample, "1", {.channels = out_channels, .spatial = true, .relu = false});
  }
}

at::Tensor BasicBlockImpl::forward(const at::Tensor& x) {
  const at::Tensor shortcut = downsample_bn_ ? downsample_bn_->forward(downsample_conv_(x)) : x;
  return bn2_->forward(conv2_(bn1_->forward(conv1_(x))), shortcut);
}

EncoderImpl::EncoderImpl(const EncoderOptions& options, const NormFactory& norm) : pool_(options.pool) {
  int64_t channels = options.widths.front();
  conv1_ = register_module("conv1", conv(options.in_channels, channels, 3, kStemStride));
  bn1_ = norm(*this, "bn1", {.channels = channels, .spatial = true, .relu = true});
  for (size_t stage = 0; stage < options.widths.size(); ++stage) {
    const int64_t width = options.widths[stage];
    const auto layer =
        register_module("layer" + std::to_string(stage + 1), std::make_shared<torch::nn::ModuleListImpl>());
    blocks_.push_back(layer->register_module("0", BasicBlock(channels, width, stage == 0 ? 1 : 2, norm)));
    channels = width;
  }
}

at::Tensor EncoderImpl::forward(const at::Tensor& images) {
  at::Tensor x = bn1_->forward(conv1_(images).contiguous(at::MemoryFormat::ChannelsLast));
  for (BasicBlock& block : blocks_) {
    x = block(x);
  }
  return at::adaptive_avg_pool2d(x, {pool_, pool_}).flatten(1);
}

}  // namespace m2teacher
