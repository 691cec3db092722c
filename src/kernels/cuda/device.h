#pragma once

#include "kernels/shape.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

// What device code is made of: types, reads and writes, shared memory.

namespace momentum_bn::kernels::cuda {

/// What values of T are computed in.
template <typename T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <typename T>
using Accumulate = typename AccumulateOf<T>::type;

__device__ inline float widened(float value) { return value; }
__device__ inline double widened(double value) { return value; }
__device__ inline float widened(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widened(__half value) { return __half2float(value); }

__device__ inline void narrow(float value, float& to) { to = value; }
__device__ inline void narrow(double value, double& to) { to = value; }
__device__ inline void narrow(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }
__device__ inline void narrow(float value, __half& to) { to = __float2half_rn(value); }

template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

/// V consecutive values, as they lie in memory: one read, one write.
template <typename T, int V>
struct Vector {
  using Word = typename WordOf<V* static_cast<int>(sizeof(T))>::type;
  Word word;

  /// Gives the values in the accumulate type.
  __device__ void get(Accumulate<T> (&to)[V]) const {
    T values[V];
    memcpy(&values, &word, sizeof(word));
#pragma unroll
    for (int j = 0; j < V; ++j) {
      to[j] = widened(values[j]);
    }
  }
  __device__ void set(const Accumulate<T> (&from)[V]) {
    T values[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      narrow(from[j], values[j]);
    }
    memcpy(&word, &values, sizeof(word));
  }
  __device__ static Vector load(const void* values, int64_t at) {
    return {*reinterpret_cast<const Word*>(static_cast<const T*>(values) + at)};
  }
  /// @param is_for_later  the cache may drop it before anything else
  __device__ void store(void* values, int64_t at, bool is_for_later = false) const {
    auto* const to = reinterpret_cast<Word*>(static_cast<T*>(values) + at);
    if (is_for_later) {
      __stcs(to, word);
    } else {
      *to = word;
    }
  }
};

/// Asks the cache for what will be read soon. Null is no address.
__device__ inline void prefetch(const void* address) {
#ifdef __CUDA_ARCH__
  if (address) {
    asm volatile("prefetch.L1 [%0];" ::"l"(address));
  }
#else
  (void)address;
#endif
}

/// The block's, as much of it as the launch asked for; aligned to 16 bytes.
__device__ inline unsigned char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ uint4 block_memory[];
  return reinterpret_cast<unsigned char*>(block_memory);
#else
  return emulated_shared_memory();
#endif
}

// The following is for blocks in a cluster, which only devices with clusters launch.

/// Waits for all threads of the cluster; each can then read what others wrote to their shared memory.
__device__ inline void cluster_arrive() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
#endif
}
__device__ inline void cluster_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __cluster_barrier_wait();
#endif
}

/// Returns where block `rank` of the cluster has what this block has at `address`.
template <typename V>
__device__ inline const V* in_cluster(const V* address, int rank) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  return static_cast<const V*>(__cluster_map_shared_rank(address, static_cast<unsigned>(rank)));
#else
  return address;
#endif
}

/// An element of an array [channels] of double for Type::kDouble, else float.
template <typename A>
__device__ inline double channel_value(const void* values, int64_t channel) {
  return static_cast<double>(static_cast<const A*>(values)[channel]);
}

}  // namespace momentum_bn::kernels::cuda
