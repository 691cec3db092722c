#pragma once

#include "kernels/cuda/walk.h"

// Two sums per channel, over a block and over all blocks of a tile: always in the same order, whichever ends last.

namespace momentum_bn::kernels::cuda {

/// Channels of a thread.
template <bool kRows, int V>
constexpr int kChannelsOf = kRows ? V : 1;

/// Whether this block is the last of `count` to get here, for all of its threads; all that the others wrote and fenced
/// before is then seen.
__device__ inline bool is_last_block(unsigned* ticket, unsigned count) {
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1U) == count - 1;
    if (last) *ticket = 0;
  }
  last = __syncthreads_or(last);
  if (last) __threadfence();
  return last;
}

/// A thread's, of N channels each.
template <int N>
struct ThreadSums {
  double first[N] = {};
  double second[N] = {};

  /// Adds what the upper half of the lanes of each column has to the lower half's, until lane 0 has the sums. Uses
  /// sums_bytes() of shared memory.
  __device__ void merge_lanes(const Tiling& tiling, const Place& place) {
#pragma unroll 1
    for (int lanes = tiling.height; lanes > 1;) {
      const int half = (lanes + 1) / 2;
      if (place.lane >= half && place.lane < lanes) put(shared(tiling, place.lane - half, place.column));
      __syncthreads();
      if (place.lane + half < lanes) {
        add(shared(tiling, place.lane, place.column), [](const double* from) { return *from; });
      }
      __syncthreads();
      lanes = half;
    }
  }

  /// Over all slices, from lane 0 of each block: true in the block that ends last, where lane 0 then has the sums.
  /// @param partials  [slices][tiles * width][N] pairs
  /// @param ticket    of the tile, 0 before and after
  __device__ bool merge_slices(const Tiling& tiling, const Place& place, double* partials, unsigned* ticket) {
    if (tiling.slices == 1) return true;
    const int64_t column = int64_t{blockIdx.x} * tiling.width + place.column;
    const bool exists = column < tiling.columns;
    const auto of_slice = [&](int64_t slice) { return partials + (slice * tiling.columns + column) * N * 2; };
    if (exists && place.lane == 0) {
      put(of_slice(blockIdx.y));
      __threadfence();
    }
    if (!is_last_block(ticket, static_cast<unsigned>(tiling.slices))) return false;
    for (int j = 0; j < N; ++j) first[j] = second[j] = 0;
    if (exists) {
      // Past the first-level cache, where another block's may have an older value.
      const auto read = [](const double* from) { return __ldcg(from); };
      for (int64_t slice = place.lane; slice < tiling.slices; slice += tiling.height) add(of_slice(slice), read);
    }
    merge_lanes(tiling, place);
    return true;
  }

  __device__ void put(double* to) const {
    for (int j = 0; j < N; ++j) {
      to[2 * j] = first[j];
      to[2 * j + 1] = second[j];
    }
  }

 private:
  __device__ static double* shared(const Tiling& tiling, int lane, int column) {
    return reinterpret_cast<double*>(shared_memory()) + (int64_t{lane} * tiling.width + column) * N * 2;
  }

  template <typename Read>
  __device__ void add(const double* from, const Read& read) {
    for (int j = 0; j < N; ++j) {
      first[j] += read(from + 2 * j);
      second[j] += read(from + 2 * j + 1);
    }
  }
};

/// run(channel, its two sums) for all channels of the block's tile, each by a thread; the sums are lane 0's.
template <int N, typename Run>
__device__ inline void for_channels_of_tile(const Tiling& tiling, const ThreadSums<N>& sums, const Place& place,
                                            const Run& run) {
  double* all = reinterpret_cast<double*>(shared_memory());
  if (place.lane == 0) sums.put(all + place.column * N * 2);
  __syncthreads();
  const int channels = tiling.channels_per_tile;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < channels; i += static_cast<int>(blockDim.x)) {
    const int64_t channel = int64_t{blockIdx.x} * channels + i;
    if (channel < tiling.channels) run(channel, all + 2 * i);
  }
}

}  // namespace momentum_bn::kernels::cuda
