#pragma once

#include "kernels/cuda/walk.h"

// Two sums per channel are formed here, over a block and over all blocks of a tile, always in the same order, whichever
// block ends last.

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
    if (last) {
      *ticket = 0;
    }
  }
  last = __syncthreads_or(last);
  if (last) {
    __threadfence();
  }
  return last;
}

/// A thread's, of N channels each.
template <int N>
struct ThreadSums {
  double first[N] = {};
  double second[N] = {};

  /// Adds what the upper half of the lanes of each column has to the lower half's, until lane 0 has the sums. Uses
  /// sums_bytes() of shared memory, where neighbouring threads use neighbouring numbers.
  __device__ void merge_lanes(const Tiling& tiling, const Place& place) {
    double* const all = reinterpret_cast<double*>(shared_memory());
#pragma unroll 1
    for (int lanes = tiling.height; lanes > 1;) {
      const int half = (lanes + 1) / 2;
      const int stride = half * tiling.width;
      const auto of_lane = [&](int lane) {
        return all + (tiling.rows ? lane * tiling.width + place.column : place.column * half + lane);
      };
      if (place.lane >= half && place.lane < lanes) {
        double* to = of_lane(place.lane - half);
        for (int j = 0; j < N; ++j) {
          to[2 * j * stride] = first[j];
          to[(2 * j + 1) * stride] = second[j];
        }
      }
      __syncthreads();
      if (place.lane + half < lanes) {
        const double* from = of_lane(place.lane);
        for (int j = 0; j < N; ++j) {
          first[j] += from[2 * j * stride];
          second[j] += from[(2 * j + 1) * stride];
        }
      }
      __syncthreads();
      lanes = half;
    }
  }

  /// Adds up all slices, from lane 0 of each block. True in the block that ends last, whose shared memory then has the
  /// sums of the tile's channels, a pair each.
  /// @param partials  [slices][channels] pairs
  /// @param ticket    of the tile, 0 before and after
  __device__ bool merge_slices(const Tiling& tiling, const Place& place, double* partials, unsigned* ticket) {
    double* const all = reinterpret_cast<double*>(shared_memory());
    if (tiling.slices == 1) {
      if (place.lane == 0) {
        put(all + place.column * N * 2);
      }
      __syncthreads();
      return true;
    }
    const int64_t first_channel = int64_t{blockIdx.x} * tiling.channels_per_tile;
    const int64_t channel = first_channel + place.column * N;
    if (channel < tiling.channels && place.lane == 0) {
      put(partials + (blockIdx.y * tiling.channels + channel) * 2);
      __threadfence();
    }
    if (!is_last_block(ticket, static_cast<unsigned>(tiling.slices))) {
      return false;
    }
    add_up(tiling, partials + first_channel * 2, tiling.channels - first_channel);
    return true;
  }

  /// Writes the sums as pairs, to an address that is a multiple of 16.
  __device__ void put(double* to) const {
    for (int j = 0; j < N; ++j) {
      reinterpret_cast<double2*>(to)[j] = {first[j], second[j]};
    }
  }

 private:
  /// Adds up the slices, of which neighbouring threads read neighbouring pairs, into the block's shared memory: there
  /// one pair for each channel of the tile.
  /// @param partials  from the tile's first channel on, which `left` follow in all tiles, this one counted
  __device__ static void add_up(const Tiling& tiling, const double* partials, int64_t left) {
    auto* const all = reinterpret_cast<double2*>(shared_memory());
    const int thread = static_cast<int>(threadIdx.x);
    const int threads = static_cast<int>(blockDim.x);
    const int channels = left < tiling.channels_per_tile ? static_cast<int>(left) : tiling.channels_per_tile;
    int lanes = threads / channels;
    // No more lanes than sums_bytes() have room for.
    if (lanes > (tiling.height + 1) / 2) {
      lanes = (tiling.height + 1) / 2;
    }
    if (lanes == 0) {
      lanes = 1;
    }
#pragma unroll 1
    for (int i = thread; i < lanes * channels; i += threads) {
      all[i] = of_slices(tiling, reinterpret_cast<const double2*>(partials) + i % channels, i / channels, lanes);
    }
    __syncthreads();
#pragma unroll 1
    while (lanes > 1) {
      const int half = (lanes + 1) / 2;
      if (thread < (lanes - half) * channels) {
        all[thread].x += all[thread + half * channels].x;
        all[thread].y += all[thread + half * channels].y;
      }
      __syncthreads();
      lanes = half;
    }
  }

  /// Adds up a channel's pairs of every `lanes`-th slice from `slice` on.
  __device__ static double2 of_slices(const Tiling& tiling, const double2* partials, int64_t slice, int lanes) {
    constexpr int kAtOnce = 8;
    double2 sum = {0, 0};
#pragma unroll 1
    for (; slice < tiling.slices; slice += kAtOnce * lanes) {
      double2 values[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int64_t of_slice = slice + k * lanes;
        // This reads past the first-level cache, which may hold an older value.
        values[k] = of_slice < tiling.slices ? __ldcg(partials + of_slice * tiling.channels) : double2{0, 0};
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        sum.x += values[k].x;
        sum.y += values[k].y;
      }
    }
    return sum;
  }
};

/// run(channel, its two sums) for all channels of the block's tile, each by a thread; behind merge_slices().
template <typename Run>
__device__ inline void for_channels_of_tile(const Tiling& tiling, const Run& run) {
  const double* const all = reinterpret_cast<const double*>(shared_memory());
  const int channels = tiling.channels_per_tile;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < channels; i += static_cast<int>(blockDim.x)) {
    const int64_t channel = int64_t{blockIdx.x} * channels + i;
    if (channel < tiling.channels) {
      run(channel, all + 2 * i);
    }
  }
}

}  // namespace momentum_bn::kernels::cuda
