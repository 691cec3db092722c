#include "data/evaluation_batches.h"

#include "data/prefetch_options.h"
#include "data/prefetcher.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>

#include <algorithm>

namespace m2teacher {
namespace {

class MemoryEvaluation : public EvaluationBatches {
 public:
  MemoryEvaluation(at::Tensor images, at::Tensor index, int64_t batch_size)
      : images_(std::move(images)), index_(std::move(index)), batch_size_(batch_size) {}

  std::optional<EvaluationBatch> next() override {
    const int64_t size = std::min(batch_size_, index_.size(0) - position_);
    if (size <= 0) {
      return std::nullopt;
    }
    position_ += size;
    const at::Tensor index = index_.narrow(0, position_ - size, size);
    return EvaluationBatch{.images = images_.index_select(0, index), .index = index};
  }

 private:
  at::Tensor images_;
  at::Tensor index_;
  int64_t batch_size_;
  int64_t position_ = 0;
};

/// A batch being filled.
struct CentreBatch {
  EvaluationBatch batch;
  at::Tensor readable;  // (N), bool
};

class ReadEvaluation : public EvaluationBatches {
 public:
  ReadEvaluation(const std::shared_ptr<const ImageSource>& source, const at::Tensor& index, int64_t batch_size,
                 const LoaderOptions& options)
      : prefetcher_(prefetch_options<CentreBatch>(options), work(source, index, batch_size)) {}

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
  static Prefetcher<CentreBatch>::Work work(const std::shared_ptr<const ImageSource>& source, const at::Tensor& index,
                                            int64_t batch_size) {
    const int64_t count = index.size(0);
    const auto items = [count, batch_size](int64_t number) {
      return std::min(batch_size, count - number * batch_size);
    };
    const auto make = [items, batch_size, index, shape = source->shape()](int64_t number) {
      const int64_t size = items(number);
      const auto bytes = at::TensorOptions(at::kByte).memory_format(at::MemoryFormat::ChannelsLast);
      return CentreBatch{.batch = {.images = at::empty({size, shape.channels, shape.height, shape.width}, bytes),
                                   .index = index.narrow(0, number * batch_size, size)},
                         .readable = at::ones({size}, at::kBool)};
    };
    const auto fill = [source](CentreBatch& batch, int64_t /*number*/, int64_t item) {
      const at::Tensor& images = batch.batch.images;
      uint8_t* const into = images.mutable_data_ptr<uint8_t>() + item * images.stride(0);
      const int64_t image = batch.batch.index.const_data_ptr<int64_t>()[item];
      batch.readable.mutable_data_ptr<bool>()[item] = source->read_centre(image, into);
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

std::unique_ptr<EvaluationBatches> make_evaluation_batches(const std::shared_ptr<const ImageSource>& source,
                                                           const at::Tensor& index, int64_t batch_size,
                                                           const LoaderOptions& options) {
  if (const at::Tensor images = source->in_memory(); images.defined()) {
    return std::make_unique<MemoryEvaluation>(images, index, batch_size);
  }
  return std::make_unique<ReadEvaluation>(source, index.contiguous(), batch_size, options);
}

}  // namespace m2teacher
