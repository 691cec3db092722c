#include "models/encoder.h"

#include "models/compute_dtype.h"

#include <ATen/ops/adaptive_avg_pool2d.h>
#include <ATen/ops/max_pool2d.h>
#include <torch/nn/init.h>
#include <torch/nn/modules/container/modulelist.h>

namespace m2teacher {
namespace {

constexpr int64_t kBottleneckExpansion = 4;

/// What the architectures differ in.
struct Plan {
  int64_t stem_channels;
  int64_t stem_kernel;
  int64_t stem_stride;
  bool max_pool;
  std::vector<int64_t> blocks;
  std::vector<int64_t> widths;
  int64_t pool;
};

Plan plan_of(const EncoderOptions& options) {
  if (options.architecture == Architecture::Small) {
    return {.stem_channels = options.widths.front(),
            .stem_kernel = 3,
            .stem_stride = 2,
            .max_pool = false,
            .blocks = std::vector<int64_t>(options.widths.size(), 1),
            .widths = options.widths,
            .pool = options.pool};
  }
  const bool small_stem = options.stem == Stem::Small;
  return {.stem_channels = 64,
          .stem_kernel = small_stem ? 3 : 7,
          .stem_stride = small_stem ? 1 : 2,
          .max_pool = !small_stem,
          .blocks = options.architecture == Architecture::ResNet18 ? std::vector<int64_t>{2, 2, 2, 2}
                                                                   : std::vector<int64_t>{3, 4, 6, 3},
          .widths = {64, 128, 256, 512},
          .pool = 1};
}

torch::nn::Conv2d conv(int64_t in_channels, int64_t out_channels, int64_t kernel, int64_t stride) {
  torch::nn::Conv2d made(
      torch::nn::Conv2dOptions(in_channels, out_channels, kernel).stride(stride).padding((kernel - 1) / 2).bias(false));
  torch::nn::init::kaiming_normal_(made->weight, /*a=*/0, torch::kFanOut, torch::kReLU);
  made->weight.set_data(made->weight.contiguous(at::MemoryFormat::ChannelsLast));
  return made;
}

/// The same images, in strides that say channels last even where there is one channel, which torch would otherwise take
/// for NCHW: the convolution's output would be too, and would have to be copied.
at::Tensor in_channels_last(const at::Tensor& images) {
  if (images.size(1) > 1) {
    return images.contiguous(at::MemoryFormat::ChannelsLast);
  }
  const int64_t height = images.size(2);
  const int64_t width = images.size(3);
  return images.contiguous().as_strided(images.sizes(), {height * width, 1, width, 1});
}

std::vector<ResidualBlockImpl::Layer> block_layers(Architecture architecture, int64_t width, int64_t stride) {
  if (architecture == Architecture::ResNet50) {
    return {{width, 1, 1}, {width, 3, stride}, {width * kBottleneckExpansion, 1, 1}};
  }
  return {{width, 3, stride}, {width, 3, 1}};
}

}  // namespace

ResidualBlockImpl::ResidualBlockImpl(int64_t in_channels, const std::vector<Layer>& layers, const NormFactory& norm) {
  int64_t channels = in_channels;
  int64_t stride = 1;
  for (const Layer& layer : layers) {
    const std::string number = std::to_string(convolutions_.size() + 1);
    convolutions_.push_back(
        register_module("conv" + number, conv(channels, layer.out_channels, layer.kernel, layer.stride)));
    norms_.push_back(norm(*this, "bn" + number, {.channels = layer.out_channels, .spatial = true, .relu = true}));
    channels = layer.out_channels;
    stride *= layer.stride;
  }
  if (stride != 1 || in_channels != channels) {
    const auto downsample = register_module("downsample", std::make_shared<torch::nn::ModuleListImpl>());
    downsample_conv_ = downsample->register_module("0", conv(in_channels, channels, 1, stride));
    downsample_bn_ = norm(*downsample, "1", {.channels = channels, .spatial = true, .relu = false});
  }
}

at::Tensor ResidualBlockImpl::forward(const at::Tensor& x) {
  const at::Tensor shortcut = downsample_bn_ ? downsample_bn_->forward(convolve(downsample_conv_, x)) : x;
  at::Tensor y = x;
  for (size_t i = 0; i + 1 < norms_.size(); ++i) {
    y = norms_[i]->forward(convolve(convolutions_[i], y));
  }
  return norms_.back()->forward(convolve(convolutions_.back(), y), shortcut);
}

EncoderImpl::EncoderImpl(const EncoderOptions& options, const NormFactory& norm) : options_(options) {
  const Plan plan = plan_of(options);
  max_pool_ = plan.max_pool;
  pool_ = plan.pool;
  int64_t channels = plan.stem_channels;
  conv1_ = register_module("conv1", conv(options.in_channels, channels, plan.stem_kernel, plan.stem_stride));
  bn1_ = norm(*this, "bn1", {.channels = channels, .spatial = true, .relu = true});
  for (size_t stage = 0; stage < plan.widths.size(); ++stage) {
    add_stage(static_cast<int64_t>(stage) + 1, channels, plan.blocks[stage], plan.widths[stage], stage == 0 ? 1 : 2,
              norm);
  }
}

void EncoderImpl::add_stage(int64_t number, int64_t& channels, int64_t blocks, int64_t width, int64_t stride,
                            const NormFactory& norm) {
  const auto stage = register_module("layer" + std::to_string(number), std::make_shared<torch::nn::ModuleListImpl>());
  for (int64_t block = 0; block < blocks; ++block) {
    const auto layers = block_layers(options_.architecture, width, block == 0 ? stride : 1);
    blocks_.push_back(stage->register_module(std::to_string(block), ResidualBlock(channels, layers, norm)));
    channels = layers.back().out_channels;
  }
}

at::Tensor EncoderImpl::forward(const at::Tensor& images) {
  at::Tensor x = bn1_->forward(convolve(conv1_, in_channels_last(images)));
  if (max_pool_) {
    x = at::max_pool2d(x, {3, 3}, {2, 2}, {1, 1});
  }
  for (ResidualBlock& block : blocks_) {
    x = block(x);
  }
  return at::adaptive_avg_pool2d(x, {pool_, pool_}).flatten(1);
}

}  // namespace m2teacher
