#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace momentum_bn::cpu {

/// The mean, the sum of squared deviations from it (one per channel) and the number of values per channel, over all
/// ranks of a group.
struct MergedStatistics {
  std::vector<double> mean;
  std::vector<double> m2;
  double count = 0;

  /// Merges the ranks in their order, so that all of them get the same bits.
  /// @param all  (ranks, 2C + 1), see `_batch_statistics` in schemas.cpp
  explicit MergedStatistics(const at::Tensor& all);
};

}  // namespace momentum_bn::cpu
