#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace momentum_bn::cpu {

/// Mean, sum of squared deviations from it (one per channel) and number of values per channel, of all ranks of a group.
struct MergedStatistics {
  std::vector<double> mean;
  std::vector<double> m2;
  double count = 0;

  /// Merges the ranks in their order, so that all of them get the same bits.
  /// @param all  (ranks, 2C + 1), see `_batch_statistics` in schemas.cpp
  explicit MergedStatistics(const at::Tensor& all);
};

}  // namespace momentum_bn::cpu
