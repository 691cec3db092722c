#pragma once

#include "data/data_options.h"
#include "data/image_source.h"

#include <memory>
#include <optional>

namespace m2teacher {

/// Images as evaluation sees them.
struct EvaluationBatch {
  at::Tensor images;  ///< (N, C, H, W), uint8
  at::Tensor index;   ///< (N), int64: which ones of the source
};

/// Chosen images of a source, in the order of the choice and as they are (a folder's: scaled, their centre). Unreadable
/// ones are left out. A folder's are read by threads ahead of the one who asks.
class EvaluationBatches {
 public:
  virtual ~EvaluationBatches() = default;

  /// The next batch, which may be empty; nothing after the last one.
  /// @throws UserError  an image cannot be read and the source is strict, or none comes in for too long
  virtual std::optional<EvaluationBatch> next() = 0;
};

/// @param index  (N), int64: which images
std::unique_ptr<EvaluationBatches> make_evaluation_batches(const std::shared_ptr<const ImageSource>& source,
                                                           const at::Tensor& index, int64_t batch_size,
                                                           const LoaderOptions& options);

}  // namespace m2teacher
