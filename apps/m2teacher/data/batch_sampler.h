#pragma once

#include <ATen/core/Tensor.h>

namespace m2teacher {

/// Which images each batch has: every epoch a new permutation, its incomplete last batch left out.
/// A function of the seed and the number of the batch alone.
class BatchSampler {
 public:
  /// @throws UserError  batch_size > dataset_size
  BatchSampler(int64_t dataset_size, int64_t batch_size, uint64_t seed);

  /// @param number  0 for the first
  /// @return (batch_size), int64
  at::Tensor batch(int64_t number);

  int64_t batches_per_epoch() const { return dataset_size_ / batch_size_; }

 private:
  int64_t dataset_size_;
  int64_t batch_size_;
  uint64_t seed_;
  int64_t epoch_ = -1;  // of the permutation
  at::Tensor permutation_;
};

}  // namespace m2teacher
