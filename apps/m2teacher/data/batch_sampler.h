#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

namespace m2teacher {

/// Endless batches of indices: every epoch a new permutation, its incomplete last batch left out.
class BatchSampler {
 public:
  /// @throws UserError  batch_size > dataset_size
  BatchSampler(int64_t dataset_size, int64_t batch_size, uint64_t seed);

  /// @return (batch_size), int64
  at::Tensor next();

 private:
  int64_t dataset_size_;
  int64_t batch_size_;
  at::Generator generator_;
  at::Tensor permutation_;
  int64_t position_ = 0;
};

}  // namespace m2teacher
