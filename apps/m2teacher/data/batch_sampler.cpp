#include "data/batch_sampler.h"

#include "error.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/randperm.h>

#include <string>

namespace m2teacher {

BatchSampler::BatchSampler(int64_t dataset_size, int64_t batch_size, uint64_t seed)
    : dataset_size_(dataset_size),
      batch_size_(batch_size),
      generator_(at::make_generator<at::CPUGeneratorImpl>(seed)),
      position_(dataset_size) {
  if (batch_size > dataset_size) {
    throw UserError("--batch-size: " + std::to_string(batch_size) + " is more than the " +
                    std::to_string(dataset_size) + " training images");
  }
}

at::Tensor BatchSampler::next() {
  if (position_ + batch_size_ > dataset_size_) {
    permutation_ = at::randperm(dataset_size_, generator_, at::kLong);
    position_ = 0;
  }
  position_ += batch_size_;
  return permutation_.narrow(0, position_ - batch_size_, batch_size_);
}

}  // namespace m2teacher
