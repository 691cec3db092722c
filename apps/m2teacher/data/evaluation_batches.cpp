#include "data/evaluation_batches.h"

#include "data/image_folder.h"
#include "data/prefetch_options.h"
#include "data/prefetcher.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>

#include <algorithm>

namespace m2teacher {
namespace {

class MemoryEvaluation : public EvaluationBatches {
 public:
  MemoryEvaluation(at::Tensor images, int64_t count, int64_t batch_size)
      : images_(std::move(images)), count_(count), batch_size_(batch_size) {}

  std::optional<EvaluationBatch> next() override {
    const int64_t size = std::min(batch_size_, count_ - position_);
    if (size <= 0) {
      return std::nullopt;
    }
    position_ += size;
    return EvaluationBatch{.images = images_.narrow(0, position_ - size, size),
                           .index = at::arange(position_ - size, position_, at::kLong)};
  }

 private:
  at::Tensor images_;
  int64_t count_;
  int64_t batch_size_;
  int64_t position_ = 0;
};

/// A batch being filled.
struct CentreBatch {
  EvaluationBatch batch;
  at::Tensor readable;  // (N), bool
};

class FolderEvaluation : public EvaluationBatches {
 public:
  FolderEvaluation(const std::shared_ptr<const FolderSource>& source, int64_t count, int64_t batch_size,
                   const LoaderOptions& options)
      : prefetcher_(prefetch_options<CentreBatch>(options), work(source, count, batch_size)) {}

  std::optional<EvaluationBatch> next() override {
    std::optional<CentreBatch> filled = next_from(prefetcher_);
    if (!filled) {
      return std::nullopt;
    }
    EvaluationBatch& batch = filled->batch;
    if (!filled->readable.all().item<bool>()) {
      const at::Tensor kept = filled->readable.nonzero().flatten();
      batch = {.images = batch.images.index_select(0, kept), .index = batch.index.index_select(0, kept)};
    }
    return std::move(batch);
  }

 private:
  static Prefetcher<CentreBatch>::Work work(const std::shared_ptr<const FolderSource>& source, int64_t count,
                                            int64_t batch_size) {
    const auto items = [count, batch_size](int64_t number) {
      return std::min(batch_size, count - number * batch_size);
    };
    const auto make = [items, batch_size, shape = source->shape()](int64_t number) {
      const int64_t size = items(number);
      const auto bytes = at::TensorOptions(at::kByte).memory_format(at::MemoryFormat::ChannelsLast);
      return CentreBatch{.batch = {.images = at::empty({size, shape.channels, shape.height, shape.width}, bytes),
                                   .index = at::arange(number * batch_size, number * batch_size + size, at::kLong)},
                         .readable = at::ones({size}, at::kBool)};
    };
    const auto fill = [source, batch_size](CentreBatch& batch, int64_t number, int64_t item) {
      const at::Tensor& images = batch.batch.images;
      uint8_t* const into = images.mutable_data_ptr<uint8_t>() + item * images.stride(0);
      batch.readable.mutable_data_ptr<bool>()[item] = source->read_centre(number * batch_size + item, into);
    };
    return {.first = 0,
            .end = (count + batch_size - 1) / batch_size,
            .items = items,
            .make = make,
            .fill = fill,
            .thread_start = use_one_thread};
  }

  Prefetcher<CentreBatch> prefetcher_;
};

}  // namespace

std::unique_ptr<EvaluationBatches> make_evaluation_batches(std::shared_ptr<const ImageSource> source, int64_t count,
                                                           int64_t batch_size, const LoaderOptions& options) {
  count = std::min(count, source->size());
  if (const auto folder = std::dynamic_pointer_cast<const FolderSource>(source)) {
    return std::make_unique<FolderEvaluation>(folder, count, batch_size, options);
  }
  return std::make_unique<MemoryEvaluation>(images_in_memory(*source), count, batch_size);
}

}  // namespace m2teacher
