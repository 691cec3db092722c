#include "eval/features.h"

#include "data/augment.h"
#include "data/batch_sampler.h"
#include "data/evaluation_batches.h"
#include "error.h"

#include <ATen/ops/cat.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/utils.h>

#include <algorithm>
#include <optional>

namespace m2teacher {
namespace {

// Small enough that the activations of a batch stay in the cache.
constexpr int64_t kEncodeBatch = 100;
constexpr int64_t kStatisticsBatch = 256;
constexpr int64_t kStatisticsBatches = 20;

}  // namespace

at::Tensor encode(Encoder& encoder, const at::Tensor& images, const PixelStatistics& pixels) {
  torch::NoGradGuard no_grad;
  encoder->eval();
  const at::Device device = encoder->parameters().front().device();
  std::vector<at::Tensor> features;
  for (const at::Tensor& batch : images.split(kEncodeBatch)) {
    features.push_back(encoder(standardise_(to_unit_range(batch.to(device)), pixels)));
  }
  return at::cat(features);
}

LabelledFeatures encode(Encoder& encoder, const std::shared_ptr<const ImageSource>& images, const at::Tensor& index,
                        const PixelStatistics& pixels, const LoaderOptions& loader) {
  const auto batches = make_evaluation_batches(images, index, kEncodeBatch, loader);
  std::vector<at::Tensor> features;
  std::vector<at::Tensor> read;
  while (const std::optional<EvaluationBatch> batch = batches->next()) {
    if (batch->images.size(0) > 0) {
      features.push_back(encode(encoder, batch->images, pixels));
      read.push_back(batch->index);
    }
  }
  if (features.empty()) {
    throw UserError("--data: none of the images can be read");
  }
  LabelledFeatures out{.features = at::cat(features), .labels = {}, .index = at::cat(read)};
  if (images->labels().defined()) {
    out.labels = images->labels().index_select(0, out.index);
  }
  return out;
}

at::Tensor raw_pixels(const at::Tensor& images) { return to_unit_range(images).flatten(1); }

Encoder untrained_encoder(const EncoderOptions& options, const at::Tensor& images, const PixelStatistics& pixels,
                          uint64_t seed) {
  torch::manual_seed(seed);
  Encoder encoder(options, batch_norm());
  // A momentum of none averages over all batches alike.
  for (const auto& module : encoder->modules()) {
    if (auto* layer = dynamic_cast<torch::nn::BatchNorm2dImpl*>(module.get())) {
      layer->options.momentum(std::nullopt);
    }
  }
  torch::NoGradGuard no_grad;
  BatchSampler sampler(images.size(0), std::min(kStatisticsBatch, images.size(0)), seed);
  for (int64_t i = 0; i < kStatisticsBatches; ++i) {
    encoder(standardise_(to_unit_range(images.index_select(0, sampler.batch(i))), pixels));
  }
  encoder->eval();
  return encoder;
}

}  // namespace m2teacher
