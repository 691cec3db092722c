#pragma once

#include "distributed/ranks.h"

#include <torch/nn/module.h>

#include <memory>

namespace m2teacher {

/// Adds up the gradients of a module's parameters over all ranks, while the backward passes still run: they are
/// collected in buckets, the last parameters' first, as these gradients come first, and a bucket is on its way as soon
/// as it and those before it are full. One of its kind for a module.
class GradientSum {
 public:
  static constexpr int64_t kBucketBytes = 25 << 20;

  /// @param passes  backward passes of a step, each of which adds to every parameter's gradient; in any threads
  GradientSum(const torch::nn::Module& module, const Ranks& ranks, int64_t passes, int64_t bucket_bytes = kBucketBytes);
  ~GradientSum();
  GradientSum(const GradientSum&) = delete;
  GradientSum& operator=(const GradientSum&) = delete;

  /// To be called after the passes: returns when every parameter's gradient is the sum over all ranks, the same bits on
  /// each. @throws LostRanks
  void finish();

 private:
  struct State;

  std::shared_ptr<State> state_;
};

}  // namespace m2teacher
