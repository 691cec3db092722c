#pragma once

#include "kernels/channel_rules.h"
#include "kernels/cuda/sums.h"

// A thread's sums of x - shift and of its square, where shift is a value of the channel, the same for all threads: the
// sums of threads and blocks are merged by adding them. In the accumulate type over a run of a few values, and there of
// x - pivot, a value of the run, so that nothing is squared that is much larger than the run's deviations; in double
// over runs, which costs little, for devices that are slow at it.

namespace momentum_bn::kernels::cuda {

template <typename T, int V, bool kRows>
class Moments {
  using A = Accumulate<T>;
  static constexpr int N = kChannelsOf<kRows, V>;

 public:
  /// Sums for the channels from `channel` on, which exist.
  __device__ Moments(const Tiling& tiling, const void* x, int64_t channel) : tiling_(tiling), x_(x) {
    A values[V];
    Vector<T, V>::load(x, kRows ? channel : channel * tiling.inner).get(values);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      shift_[j] = values[j];
    }
  }

  /// @param keep  called with each vector, in turn
  template <typename Keep>
  __device__ void add(Walk<kRows, V> walk, const Keep& keep) {
#pragma unroll 1
    while (walk.left > 0) {
      const Walk<kRows, V> begin = walk;
      Run run;
#pragma unroll 1
      for (int batch = 0; batch < kBatchesPerRun && walk.left > 0; ++batch) {
        add_batch(run, walk, keep);
      }
      if (!take(run)) {
        add_in_double(begin, run.vectors);
      }
    }
  }

  __device__ static double shift_of(const Tiling& tiling, const void* x, int64_t channel) {
    A shift[1];
    Vector<T, 1>::load(x, kRows ? channel : channel * tiling.inner).get(shift);
    return static_cast<double>(shift[0]);
  }

  /// Returns the moments of a channel that has these sums over all threads.
  __device__ static BatchMoments of_channel(const Tiling& tiling, double shift, const double* sums) {
    const auto count = static_cast<double>(tiling.positions * tiling.vector / (kRows ? V : 1));
    const double mean = sums[0] / count;
    const double m2 = sums[1] - sums[0] * mean;
    return {shift + mean, m2 < 0 ? 0 : m2, count};
  }

  ThreadSums<N> sums;

 private:
  static constexpr int K = kBatchOf<T, V>;
  /// A run is 64 values, which are added up in the accumulate type.
  static constexpr int kBatchesPerRun = 64 / K;

  struct Run {
    A pivot[N];
    A first[V] = {};
    A second[V] = {};
    int vectors = 0;
  };

  template <typename Keep>
  __device__ void add_batch(Run& run, Walk<kRows, V>& walk, const Keep& keep) {
    int64_t at[K];
    const int count = walk.next_batch(tiling_, at);
    Vector<T, V> vectors[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k < count) {
        vectors[k] = Vector<T, V>::load(x_, at[k]);
      }
    }
    if (run.vectors == 0) {
      set_pivot(run, vectors, count);
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k >= count) {
        continue;
      }
      A values[V];
      vectors[k].get(values);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A d = values[j] - run.pivot[kRows ? j : 0];
        run.first[j] += d;
        run.second[j] += d * d;
      }
      keep(vectors[k]);
    }
    run.vectors += count;
  }

  /// The mean of the first few values, which lies near the run's: of the first alone one run in ten thousand is too far
  /// away. Of too few, which end a walk, the first.
  __device__ static void set_pivot(Run& run, const Vector<T, V> (&vectors)[K], int count) {
    A sum[V];
    vectors[0].get(sum);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      run.pivot[j] = sum[j];
    }
    if (count < K) {
      return;
    }
#pragma unroll
    for (int k = 1; k < K; ++k) {
      A values[V];
      vectors[k].get(values);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        sum[j] += values[j];
      }
    }
    constexpr A kPerValue = A{N} / (K * V);  // a power of 2: exact
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int i = 1; i < V / N; ++i) {
        sum[j] += sum[i];
      }
      run.pivot[j] = sum[j] * kPerValue;
    }
  }

  /// False, and nothing is taken in, where the accumulate type is too narrow.
  __device__ bool take(Run& run) {
    constexpr int kEach = V / N;
    const int count = run.vectors * kEach;
    bool all_good = true;
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int i = 1; i < kEach; ++i) {
        run.first[j] += run.first[i];
        run.second[j] += run.second[i];
      }
      all_good = all_good && is_good(run.first[j], run.second[j], static_cast<A>(count));
    }
    if (!all_good) {
      return false;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const double away = static_cast<double>(run.pivot[j]) - static_cast<double>(shift_[j]);
      const auto first = static_cast<double>(run.first[j]);
      sums.first[j] += count * away + first;
      sums.second[j] += away * (count * away + 2 * first) + static_cast<double>(run.second[j]);
    }
    return true;
  }

  /// Whether these are finite and the pivot is not far from the run's mean, in units of its deviation.
  __device__ static bool is_good(A first, A second, A count) {
    constexpr A kMost = A{15} / 16;
    return isfinite(second) && first * (first / count) <= kMost * second;
  }

  /// Adds all vectors of a run.
  __device__ void add_in_double(Walk<kRows, V> walk, int vectors) {
#pragma unroll 1
    for (; vectors > 0; --vectors) {
      A values[V];
      Vector<T, V>::load(x_, walk.at).get(values);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int n = kRows ? j : 0;
        const double d = static_cast<double>(values[j]) - static_cast<double>(shift_[n]);
        sums.first[n] += d;
        sums.second[n] += d * d;
      }
      walk.next(tiling_);
    }
  }

  const Tiling& tiling_;
  const void* x_;
  A shift_[N];
};

}  // namespace momentum_bn::kernels::cuda
