#pragma once

#include "data/augment_options.h"
#include "data/batch_sampler.h"
#include "data/batch_share.h"
#include "data/data_options.h"
#include "data/image_source.h"

#include <memory>

namespace m2teacher {

/// The images to train on, and how to read and standardise them.
struct TrainingData {
  std::shared_ptr<const ImageSource> source;
  PixelStatistics pixels;
  LoaderOptions loader;
};

/// A batch, or this process's share of it, as it was read.
// NOLINTNEXTLINE(clang-analyzer-core.uninitialized.Assign): it is initialised
struct TrainingBatch {
  /// For each view (B, C, H, W), uint8: the same whole images, or the view's own crops where `cropped`.
  std::array<at::Tensor, 2> views;
  bool cropped = false;
};

/// Gives the batch of any number: images in memory at once, others read by threads ahead of those that follow one
/// another. An unreadable image is replaced by the next one of its source. Batches depend on the seed and their number
/// alone.
class TrainingBatches {
 public:
  virtual ~TrainingBatches() = default;

  /// @param number  0 for the first
  /// @throws UserError  an image cannot be read and the source is strict, too many cannot, or none comes in for too
  /// long
  virtual TrainingBatch batch(int64_t number) = 0;
};

/// @param end  number of the batch from which on none is read ahead
/// @throws UserError  the batch is larger than the source
std::unique_ptr<TrainingBatches> make_training_batches(const TrainingData& data, const AugmentOptions& augment,
                                                       int64_t batch_size, uint64_t seed, int64_t end);
/// @param share   of each batch
/// @param pinned  whether the images lie in pinned memory, from which a GPU copies them while it computes
std::unique_ptr<TrainingBatches> make_training_batches(const TrainingData& data, const AugmentOptions& augment,
                                                       int64_t batch_size, const BatchShare& share, uint64_t seed,
                                                       int64_t end, bool pinned = false);

}  // namespace m2teacher
