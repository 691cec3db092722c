#pragma once

#include "kernels/cuda/sums.h"

// What kernels that keep values on chip have in common: each block has a part of a tile in shared memory, and the
// slices of a tile are a thread-block cluster, whose blocks read each other's sums.

namespace momentum_bn::kernels::cuda {

/// A thread's vectors in shared memory, one after the other.
template <typename T, int V>
class KeptVectors {
 public:
  __device__ explicit KeptVectors(unsigned char* memory)
      : next_(reinterpret_cast<Vector<T, V>*>(memory) + threadIdx.x) {}
  __device__ void put(const Vector<T, V>& vector) {
    *next_ = vector;
    next_ += blockDim.x;
  }
  __device__ Vector<T, V> take() {
    const Vector<T, V> vector = *next_;
    next_ += blockDim.x;
    return vector;
  }

 private:
  Vector<T, V>* next_;
};

/// The sums of a tile's channels, N of a thread, over the blocks of a cluster. Each function is called by all threads.
template <int N>
class TileSums {
 public:
  /// @param memory  two doubles per channel, of shared memory
  __device__ TileSums(const Tiling& tiling, unsigned char* memory)
      : tiling_(tiling), sums_(reinterpret_cast<double*>(memory)) {}

  /// Puts this block's sums where the cluster reads them, and waits for those of all.
  __device__ void exchange(const ThreadSums<N>& sums, const Place& place) const {
    if (place.lane == 0) {
      sums.put(sums_ + place.column * N * 2);
    }
    __syncthreads();
    if (!in_cluster_of_several()) {
      return;
    }
    cluster_arrive();
    cluster_wait();
  }

  /// Gives the sums of channel i of the tile over all blocks. One thread calls it.
  __device__ void merge(int i, double (&to)[2]) const {
    const auto* const of_block = reinterpret_cast<const double2*>(sums_) + i;
    if (!in_cluster_of_several()) {
      to[0] = of_block->x;
      to[1] = of_block->y;
      return;
    }
    double2 of_rank[kMostInCluster];
#pragma unroll
    for (int rank = 0; rank < kMostInCluster; ++rank) {
      of_rank[rank] = rank < tiling_.slices ? *in_cluster(of_block, rank) : double2{0, 0};
    }
    to[0] = to[1] = 0;
#pragma unroll
    for (int rank = 0; rank < kMostInCluster; ++rank) {
      to[0] += of_rank[rank].x;
      to[1] += of_rank[rank].y;
    }
  }

  /// From here on this block does not read the others' sums any more.
  __device__ void release() const {
    __syncthreads();
    if (in_cluster_of_several()) {
      cluster_arrive();
    }
  }

  /// Called after release(), waits until no block reads this one's sums any more. Without it no block may end.
  __device__ void wait_for_others() const {
    if (in_cluster_of_several()) {
      cluster_wait();
    }
  }

  /// Whether this block does what is done once for a tile.
  __device__ static bool is_first() { return blockIdx.y == 0; }

  /// run(channel, its number in the tile) for the tile's channels, each by the same thread every time.
  template <typename Run>
  __device__ void for_channels(const Run& run) const {
    const int channels = tiling_.channels_per_tile;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < channels; i += static_cast<int>(blockDim.x)) {
      const int64_t channel = int64_t{blockIdx.x} * channels + i;
      if (channel < tiling_.channels) {
        run(channel, i);
      }
    }
  }

 private:
  __device__ bool in_cluster_of_several() const { return tiling_.slices > 1; }

  const Tiling& tiling_;
  double* sums_;
};

}  // namespace momentum_bn::kernels::cuda
