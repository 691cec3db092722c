#pragma once

#include "kernels/cuda/blend.h"
#include "kernels/cuda/walk.h"

// y from x.

namespace momentum_bn::kernels::cuda {

/// The coefficients of a thread's N channels.
template <typename A, int N>
struct ThreadCoefficients {
  A center[N];
  A scale[N];
  A shift[N];

  __device__ explicit ThreadCoefficients(const Coefficients<A>* of_channels) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      center[j] = of_channels[j].center;
      scale[j] = of_channels[j].scale;
      shift[j] = of_channels[j].shift;
    }
  }
};

/// torch's, which keeps NaN.
template <typename A>
__device__ inline A relu(A value) {
  return value <= 0 ? 0 : value;
}

/// Normalises by one way of rounding, so that a backward pass can make the same value again.
template <typename A>
__device__ inline A normalised(A x, A center, A scale, A shift) {
  return fma(x - center, scale, shift);
}

template <typename T, int V, bool kRows>
class Normalize {
  using A = Accumulate<T>;
  static constexpr int K = kBatchOf<T, V>;

 public:
  /// @param y_is_for_later  the cache may drop y before anything else
  __device__ Normalize(const ForwardArgs& args, const ThreadCoefficients<A, kRows ? V : 1>& coefficients,
                       bool y_is_for_later)
      : args_(args), coefficients_(coefficients), y_is_for_later_(y_is_for_later) {}

  /// Writes y of a vector of x whose residual is `residual`, if there is any.
  __device__ void operator()(const Vector<T, V>& x, const Vector<T, V>& residual, int64_t at) const {
    A values[V];
    x.get(values);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int n = kRows ? j : 0;
      values[j] = normalised(values[j], coefficients_.center[n], coefficients_.scale[n], coefficients_.shift[n]);
    }
    if (args_.residual) {
      A more[V];
      residual.get(more);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        values[j] += more[j];
      }
    }
    if (args_.relu) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        values[j] = relu(values[j]);
      }
    }
    Vector<T, V> y;
    y.set(values);
    y.store(args_.y, at, y_is_for_later_);
  }

  /// Writes all of a thread's y.
  /// @param read_x  called for each vector, in turn, with the position of its first value
  template <bool kBack, typename ReadX>
  __device__ void run(const Tiling& tiling, Walk<kRows, V, kBack> walk, const ReadX& read_x) const {
#pragma unroll 1
    while (walk.left > 0) {
      int64_t at[K];
      const int count = walk.next_batch(tiling, at);
      Vector<T, V> x[K];
      Vector<T, V> residual[K];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (k < count) {
          x[k] = read_x(at[k]);
        }
      }
      if (args_.residual) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (k < count) {
            residual[k] = Vector<T, V>::load(args_.residual, at[k]);
          }
        }
      }
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (k < count) {
          (*this)(x[k], residual[k], at[k]);
        }
      }
    }
  }

 private:
  const ForwardArgs& args_;
  const ThreadCoefficients<A, kRows ? V : 1>& coefficients_;
  bool y_is_for_later_;
};

}  // namespace momentum_bn::kernels::cuda
