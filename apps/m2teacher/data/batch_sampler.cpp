#include "data/batch_sampler.h"

#include "data/random.h"
#include "error.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/randperm.h>

#include <string>

namespace m2teacher {

BatchSampler::BatchSampler(int64_t dataset_size, int64_t batch_size, uint64_t seed)
    : dataset_size_(dataset_size), batch_size_(batch_size), seed_(seed) {
  if (batch_size > dataset_size) {
    throw UserError("--batch-size: " + std::to_string(batch_size) + " is more than the " +
                    std::to_string(dataset_size) + " training images");
  }
}

at::Tensor BatchSampler::batch(int64_t number) {
  const int64_t epoch = number / batches_per_epoch();
  if (epoch != epoch_) {
    at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(derived_seed(seed_, Purpose::Shuffle, epoch));
    permutation_ = at::randperm(dataset_size_, generator, at::kLong);
    epoch_ = epoch;
  }
  return permutation_.narrow(0, number % batches_per_epoch() * batch_size_, batch_size_);
}

}  // namespace m2teacher
