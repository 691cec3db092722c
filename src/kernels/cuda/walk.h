#pragma once

#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"

// Which values a thread has.

namespace momentum_bn::kernels::cuda {

struct Quotient {
  int64_t quotient;
  int64_t rest;
};

/// Divides numbers that are not negative. Devices divide by 32 bits several times faster than by 64.
__device__ inline Quotient divided(int64_t value, int64_t by) {
  if (((value | by) >> 32) == 0) {
    const auto narrow_value = static_cast<uint32_t>(value);
    const auto narrow_by = static_cast<uint32_t>(by);
    return {narrow_value / narrow_by, narrow_value % narrow_by};
  }
  return {value / by, value % by};
}

/// A thread's place in its tile: neighbouring threads read neighbouring vectors.
struct Place {
  int column;
  int lane;

  template <bool kRows>
  __device__ static Place of(const Tiling& tiling) {
    const int thread = static_cast<int>(threadIdx.x);
    if (kRows) {
      return {thread % tiling.width, thread / tiling.width};
    }
    return {thread / tiling.height, thread % tiling.height};
  }
};

/// The first channel of a thread's column.
template <bool kRows, int V>
__device__ inline int64_t channel_of(const Tiling& tiling, int64_t tile, const Place& place) {
  return (tile * tiling.width + place.column) * (kRows ? V : 1);
}

/// Vectors that a thread reads before it waits for the first: more where they are small.
template <typename T, int V>
constexpr int kBatchOf = V * sizeof(T) <= 8 ? 2 * kBatch : kBatch;

/// A thread's vectors, one after the other.
/// @tparam kBack  from the last one to the first
template <bool kRows, int V, bool kBack = false>
struct Walk {
  int64_t at = 0;    // of the vector's first value
  int64_t left = 0;  // vectors to go, this one counted
  int64_t in_plane = 0;

  __device__ Walk(const Tiling& tiling, int64_t tile, int64_t slice, const Place& place) {
    const int64_t column = tile * tiling.width + place.column;
    const int64_t first = slice * tiling.positions_per_slice + place.lane;
    int64_t end = (slice + 1) * tiling.positions_per_slice;
    if (end > tiling.positions) {
      end = tiling.positions;
    }
    if (column >= tiling.columns || first >= end) {
      return;
    }
    left = divided(end - first + tiling.height - 1, tiling.height).quotient;
    const int64_t begin = kBack ? first + (left - 1) * tiling.height : first;
    if (kRows) {
      at = begin * tiling.channels + column * V;
    } else {
      const auto [outer, vector] = divided(begin, tiling.plane);
      in_plane = vector;
      at = (outer * tiling.channels + column) * tiling.inner + vector * V;
    }
  }

  __device__ void next(const Tiling& tiling) {
    --left;
    if (kBack) {
      return back(tiling);
    }
    at += tiling.step;
    if (kRows) {
      return;
    }
    in_plane += tiling.step_in_plane;
    if (in_plane < tiling.plane) {
      return;
    }
    in_plane -= tiling.plane;
    at += tiling.skip;
  }

  /// Gives where the next vectors are, up to K, and goes on behind them. Returns how many there are.
  template <int K>
  __device__ int next_batch(const Tiling& tiling, int64_t (&to)[K]) {
    const int count = left < K ? static_cast<int>(left) : K;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      to[k] = at;
      if (k < count) {
        next(tiling);
      }
    }
    return count;
  }

 private:
  __device__ void back(const Tiling& tiling) {
    at -= tiling.step;
    if (kRows) {
      return;
    }
    in_plane -= tiling.step_in_plane;
    if (in_plane >= 0) {
      return;
    }
    in_plane += tiling.plane;
    at -= tiling.skip;
  }
};

}  // namespace momentum_bn::kernels::cuda
