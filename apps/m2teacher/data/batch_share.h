#pragma once

#include <cstdint>

namespace m2teacher {

/// The part of every batch that one process takes.
struct BatchShare {
  int64_t first;  ///< place in the batch of its first image
  int64_t count;
};

/// Shares follow one another in the order of ranks, and differ by one image at most.
inline BatchShare share_of_batch(int64_t batch_size, int64_t rank, int64_t ranks) {
  const int64_t first = batch_size * rank / ranks;
  return {.first = first, .count = batch_size * (rank + 1) / ranks - first};
}

}  // namespace m2teacher
