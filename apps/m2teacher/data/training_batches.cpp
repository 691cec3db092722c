#include "data/training_batches.h"

#include "data/prefetch_options.h"
#include "data/prefetcher.h"
#include "error.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>

#include <algorithm>
#include <optional>
#include <string>

namespace m2teacher {
namespace {

// So many unreadable images in a row are no accident.
constexpr int64_t kMostReplacements = 1000;

class MemoryBatches : public TrainingBatches {
 public:
  MemoryBatches(at::Tensor images, BatchSampler sampler, const BatchShare& share, bool pinned)
      : images_(std::move(images)), sampler_(std::move(sampler)), share_(share), pinned_(pinned) {}

  TrainingBatch batch(int64_t number) override {
    at::Tensor whole = at::empty({0}, images_.options().pinned_memory(pinned_));
    at::index_select_out(whole, images_, 0, sampler_.batch(number).narrow(0, share_.first, share_.count));
    return {.views = {whole, whole}, .cropped = false};
  }

 private:
  at::Tensor images_;
  BatchSampler sampler_;
  BatchShare share_;
  bool pinned_;
};

/// A batch being filled, with the images that it is filled from.
struct CropBatch {
  TrainingBatch batch;
  at::Tensor index;
};

/// What reads crops of images; its threads share it.
class CropReader {
 public:
  CropReader(std::shared_ptr<const ImageSource> source, const AugmentOptions& augment, const BatchSampler& sampler,
             const BatchShare& share, uint64_t seed, bool pinned)
      : source_(std::move(source)), augment_(augment), sampler_(sampler), share_(share), seed_(seed), pinned_(pinned) {}

  CropBatch make(int64_t number) {
    const ImageShape shape = source_->shape();
    // The source writes pixel after pixel, which is channels last.
    const auto empty = [&] {
      return at::empty(
          {share_.count, shape.channels, shape.height, shape.width},
          at::TensorOptions(at::kByte).memory_format(at::MemoryFormat::ChannelsLast).pinned_memory(pinned_));
    };
    return {.batch = {.views = {empty(), empty()}, .cropped = true},
            .index = sampler_.batch(number).narrow(0, share_.first, share_.count)};
  }

  void fill(CropBatch& batch, int64_t number, int64_t item) const {
    std::vector<uint8_t*> into;
    into.reserve(batch.batch.views.size());
    for (const at::Tensor& view : batch.batch.views) {
      into.push_back(view.mutable_data_ptr<uint8_t>() + item * view.stride(0));
    }
    const auto choose = [&](int64_t height, int64_t width) {
      std::vector<CropBox> boxes;
      for (const int64_t view : {0, 1}) {
        const ViewPlace place{.seed = seed_, .batch = number, .view = view, .place = share_.first + item};
        boxes.push_back(random_crop(augment_, height, width, Random(Purpose::Crop, place)));
      }
      return boxes;
    };
    const int64_t wanted = batch.index.const_data_ptr<int64_t>()[item];
    const int64_t tries = std::min(source_->size(), kMostReplacements);
    for (int64_t attempt = 0; attempt < tries; ++attempt) {
      if (source_->read((wanted + attempt) % source_->size(), choose, into)) {
        return;
      }
    }
    throw UserError("--data: " + std::to_string(tries) + " unreadable images in a row");
  }

 private:
  std::shared_ptr<const ImageSource> source_;
  AugmentOptions augment_;
  BatchSampler sampler_;
  BatchShare share_;
  uint64_t seed_;
  bool pinned_;
};

class CropBatches : public TrainingBatches {
 public:
  CropBatches(std::shared_ptr<CropReader> reader, const LoaderOptions& options, int64_t images, int64_t end)
      : reader_(std::move(reader)), options_(options), images_(images), end_(end) {}

  TrainingBatch batch(int64_t number) override {
    if (!prefetcher_ || prefetcher_->position() != number) {
      start_at(number);
    }
    return next_from(*prefetcher_)->batch;
  }

 private:
  void start_at(int64_t first) {
    prefetcher_.reset();
    prefetcher_.emplace(
        prefetch_options<CropBatch>(options_),
        Prefetcher<CropBatch>::Work{.first = first,
                                    .end = std::max(end_, first + 1),
                                    .items = [images = images_](int64_t) { return images; },
                                    .make = [reader = reader_](int64_t number) { return reader->make(number); },
                                    .fill = [reader = reader_](CropBatch& batch, int64_t number,
                                                               int64_t item) { reader->fill(batch, number, item); },
                                    .thread_start = use_one_thread});
  }

  std::shared_ptr<CropReader> reader_;
  LoaderOptions options_;
  int64_t images_;  // of a batch
  int64_t end_;
  std::optional<Prefetcher<CropBatch>> prefetcher_;
};

}  // namespace

std::unique_ptr<TrainingBatches> make_training_batches(const TrainingData& data, const AugmentOptions& augment,
                                                       int64_t batch_size, uint64_t seed, int64_t end) {
  return make_training_batches(data, augment, batch_size, {.first = 0, .count = batch_size}, seed, end);
}

std::unique_ptr<TrainingBatches> make_training_batches(const TrainingData& data, const AugmentOptions& augment,
                                                       int64_t batch_size, const BatchShare& share, uint64_t seed,
                                                       int64_t end, bool pinned) {
  BatchSampler sampler(data.source->size(), batch_size, seed);
  if (const at::Tensor images = data.source->in_memory(); images.defined()) {
    return std::make_unique<MemoryBatches>(images, std::move(sampler), share, pinned);
  }
  auto reader = std::make_shared<CropReader>(data.source, augment, sampler, share, seed, pinned);
  return std::make_unique<CropBatches>(std::move(reader), data.loader, share.count, end);
}

}  // namespace m2teacher
