#pragma once

#include "distributed/ranks.h"

#include <torch/nn/module.h>

#include <memory>

namespace m2teacher {

/// Adds up the gradients of a module's parameters over the batches of a step and over all ranks, while the backward
/// passes still run: they are collected in buckets, the last parameters' first, as these gradients come first, and in
/// the last batch a bucket is on its way as soon as it and those before it are full. One of its kind for a module.
///
/// The sums are the same bits every time: those of a batch's passes, of which there are two at most, are added up in
/// any order, then those of the batches in theirs.
class GradientSum {
 public:
  static constexpr int64_t kBucketBytes = 25 << 20;

  /// @param passes   backward passes of a batch, each of which adds to every parameter's gradient; in any threads
  /// @param batches  of a step
  GradientSum(const torch::nn::Module& module, const Ranks& ranks, int64_t passes, int64_t batches = 1,
              int64_t bucket_bytes = kBucketBytes);
  ~GradientSum();
  GradientSum(const GradientSum&) = delete;
  GradientSum& operator=(const GradientSum&) = delete;

  /// To be called after the last batch: returns when every parameter's gradient is the sum, the same bits on all ranks.
  /// @throws LostRanks
  void finish();

 private:
  struct State;

  std::shared_ptr<State> state_;
};

}  // namespace m2teacher
