#pragma once

#include "kernels/channel_rules.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/normalize.h"
#include "kernels/cuda/sums.h"

// A thread's part of a backward pass: the gradient g of what was normalised, its sums, and dx.

namespace momentum_bn::kernels::cuda {

/// What of dy the activation let through.
enum class Mask {
  kNone,
  kFromY,  // where there is a y
  kFromX,
};

/// run.operator()<Mask>() with how a kernel that reads dy masks it.
template <typename Run>
int with_mask(const BackwardArgs& args, const Run& run) {
  return args.relu && !args.y ? run.template operator()<Mask::kFromX>() : run.template operator()<Mask::kFromY>();
}

// What is kept of one channel.

template <typename A>
__device__ inline SavedStatistics<A> saved_of(const BackwardArgs& args, int64_t channel) {
  const int64_t channels = args.shape.channels;
  const A* saved = static_cast<const A*>(args.saved) + channel;
  return {saved[0], saved[channels], saved[2 * channels]};
}

template <typename A>
__device__ inline double weight_of(const BackwardArgs& args, int64_t channel) {
  return args.weight ? channel_value<A>(args.weight, channel) : 1;
}

/// Returns the coefficients that the forward pass had.
template <typename A>
__device__ inline Coefficients<A> forward_coefficients(const BackwardArgs& args, int64_t channel) {
  const double bias = args.bias ? channel_value<A>(args.bias, channel) : 0;
  return coefficients_of(saved_of<A>(args, channel), weight_of<A>(args, channel), bias);
}

/// kGradientNumbers: what dx of a channel is formed with, through the statistics, and its mask again from x.
template <typename A>
struct ChannelGradient {
  Coefficients<A> forward;
  A offset;
  A deviation_scale;
  A rest;

  /// Forms it from these sums over all values.
  __device__ static ChannelGradient of(const BackwardArgs& args, int64_t channel, const GradientSums& sums) {
    const int64_t channels = args.shape.channels;
    const A* shares = static_cast<const A*>(args.saved) + 3 * channels + channel;
    const auto of_input = input_gradient_coefficients<A>(
        saved_of<A>(args, channel), exact_shares(SavedShares<A>{shares[0], shares[channels], shares[2 * channels]}),
        weight_of<A>(args, channel), sums);
    // The scale of dx is the forward pass's.
    return {forward_coefficients<A>(args, channel), of_input.offset, of_input.deviation_scale, of_input.rest};
  }
};

/// How many positions, of two or three tensors each, a thread reads before it waits for the first.
template <typename T, int V>
constexpr int kBackwardBatchOf = kBatchOf<T, V> / 2;

/// What a backward pass reads at one position: where x or y is not read, it is not there.
template <typename T, int V>
struct BackwardVectors {
  Vector<T, V> dy;
  Vector<T, V> x;
  Vector<T, V> y;

  __device__ static BackwardVectors load(const BackwardArgs& args, int64_t at) {
    BackwardVectors vectors;
    vectors.dy = Vector<T, V>::load(args.dy, at);
    if (args.x) {
      vectors.x = Vector<T, V>::load(args.x, at);
    }
    if (args.y) {
      vectors.y = Vector<T, V>::load(args.y, at);
    }
    return vectors;
  }
};

/// Makes g from dy, for a thread's N channels. Where y is NaN, nothing is masked.
template <typename T, int V, bool kRows, Mask kMask>
class Masking {
  using A = Accumulate<T>;
  static constexpr int N = kChannelsOf<kRows, V>;

 public:
  __device__ explicit Masking(bool has_y = false) : has_y_(has_y) {}

  __device__ void set_channel(int j, const Coefficients<A>& forward) {
    if constexpr (kMask == Mask::kFromX) {
      center_[j] = forward.center;
      shift_[j] = forward.shift;
    }
  }

  /// @param inputs  of x
  /// @param scale   the forward pass's
  __device__ void apply(A (&g)[V], const BackwardVectors<T, V>& vectors, const A (&inputs)[V],
                        const A (&scale)[N]) const {
    if constexpr (kMask == Mask::kFromX) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int n = kRows ? j : 0;
        T output;
        // Rounded as y was: it may be 0 where what was rounded is not.
        narrow(normalised(inputs[j], center_[n], scale[n], shift_[n]), output);
        g[j] = widened(output) <= 0 ? 0 : g[j];
      }
    } else if (kMask == Mask::kFromY && has_y_) {
      A outputs[V];
      vectors.y.get(outputs);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        g[j] = outputs[j] <= 0 ? 0 : g[j];
      }
    }
  }

 private:
  static constexpr int kKept = kMask == Mask::kFromX ? N : 1;
  bool has_y_;
  A center_[kKept];
  A shift_[kKept];
};

template <typename T, int V>
__device__ inline void write(void* to, const Accumulate<T> (&values)[V], int64_t at, bool is_for_later = false) {
  Vector<T, V> vector;
  vector.set(values);
  vector.store(to, at, is_for_later);
}

/// A thread's sums of g and g * (x - center), in the accumulate type over a run of a few values, in double over runs.
template <typename T, int V, bool kRows, Mask kMask>
class ThreadGradientSums {
  using A = Accumulate<T>;
  static constexpr int N = kChannelsOf<kRows, V>;

 public:
  /// Sums for the channels from `channel` on, which exist.
  __device__ ThreadGradientSums(const BackwardArgs& args, int64_t channel) : args_(args), masking_(args.y) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const auto forward = forward_coefficients<A>(args, channel + j);
      center_[j] = saved_of<A>(args, channel + j).center;
      scale_[j] = forward.scale;
      masking_.set_channel(j, forward);
    }
  }

  /// Writes dresidual, and dx where args has one: with constant statistics.
  /// @param keep  called with g and the vectors read at each position, in turn
  template <typename Keep>
  __device__ void run(const Tiling& tiling, Walk<kRows, V> walk, const Keep& keep) {
    while (walk.left > 0) {
      Run run;
#pragma unroll 1
      for (int batch = 0; batch < kBatchesPerRun && walk.left > 0; ++batch) {
        add_batch(run, tiling, walk, keep);
      }
      take(run);
    }
  }

  ThreadSums<N> sums;

 private:
  struct Run {
    A g[V] = {};
    A gx[V] = {};
  };
  static constexpr int K = kBackwardBatchOf<T, V>;
  /// A run is 64 values, which are added up in the accumulate type.
  static constexpr int kBatchesPerRun = 64 / K;

  template <typename Keep>
  __device__ void add_batch(Run& run, const Tiling& tiling, Walk<kRows, V>& walk, const Keep& keep) const {
    int64_t at[K];
    const int count = walk.next_batch(tiling, at);
    BackwardVectors<T, V> vectors[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k < count) {
        vectors[k] = BackwardVectors<T, V>::load(args_, at[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k < count) {
        add_vectors(run, vectors[k], at[k], keep);
      }
    }
  }

  template <typename Keep>
  __device__ void add_vectors(Run& run, const BackwardVectors<T, V>& vectors, int64_t at, const Keep& keep) const {
    A g[V];
    A inputs[V];
    vectors.dy.get(g);
    if (args_.x) {
      vectors.x.get(inputs);
    }
    masking_.apply(g, vectors, inputs, scale_);
    if (args_.x) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        run.gx[j] += g[j] * (inputs[j] - center_[kRows ? j : 0]);
      }
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      run.g[j] += g[j];
    }
    if (args_.dresidual) {
      write<T>(args_.dresidual, g, at);
    }
    keep(g, vectors);
    if (args_.dx) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        g[j] *= scale_[kRows ? j : 0];
      }
      write<T>(args_.dx, g, at);
    }
  }

  __device__ void take(const Run& run) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      A g = run.g[j];
      A gx = run.gx[j];
#pragma unroll
      for (int i = 1; i < V / N; ++i) {
        g += run.g[i];
        gx += run.gx[i];
      }
      sums.first[j] += static_cast<double>(g);
      sums.second[j] += static_cast<double>(gx);
    }
  }

  const BackwardArgs& args_;
  Masking<T, V, kRows, kMask> masking_;
  A center_[N];
  A scale_[N];
};

/// Forms dx of a thread's N channels through the statistics.
template <typename T, int V, bool kRows, Mask kMask>
class InputGradient {
  using A = Accumulate<T>;
  static constexpr int N = kChannelsOf<kRows, V>;
  static constexpr int K = kBackwardBatchOf<T, V>;

 public:
  /// @param dx_is_for_later  the cache may drop dx before anything else
  /// @param of_channels      of the thread's channels
  __device__ InputGradient(void* dx, bool dx_is_for_later, bool has_y, const ChannelGradient<A>* of_channels)
      : dx_(dx), dx_is_for_later_(dx_is_for_later), masking_(has_y) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      center_[j] = of_channels[j].forward.center;
      scale_[j] = of_channels[j].forward.scale;
      offset_[j] = of_channels[j].offset;
      deviation_scale_[j] = of_channels[j].deviation_scale;
      rest_[j] = of_channels[j].rest;
      masking_.set_channel(j, of_channels[j].forward);
    }
  }

  /// Writes all of a thread's dx.
  /// @param read  called for each position, in turn, gives its BackwardVectors
  template <bool kBack, typename Read>
  __device__ void run(const Tiling& tiling, Walk<kRows, V, kBack> walk, const Read& read) const {
#pragma unroll 1
    while (walk.left > 0) {
      int64_t at[K];
      const int count = walk.next_batch(tiling, at);
      BackwardVectors<T, V> vectors[K];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (k < count) {
          vectors[k] = read(at[k]);
        }
      }
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (k < count) {
          write_dx(vectors[k], at[k]);
        }
      }
    }
  }

 private:
  __device__ void write_dx(const BackwardVectors<T, V>& vectors, int64_t at) const {
    A g[V];
    A inputs[V];
    vectors.dy.get(g);
    vectors.x.get(inputs);
    masking_.apply(g, vectors, inputs, scale_);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int n = kRows ? j : 0;
      g[j] = (g[j] - offset_[n]) * scale_[n] + ((inputs[j] - center_[n]) * deviation_scale_[n] + rest_[n]);
    }
    write<T>(dx_, g, at, dx_is_for_later_);
  }

  void* dx_;
  bool dx_is_for_later_;
  Masking<T, V, kRows, kMask> masking_;
  A center_[N];
  A scale_[N];
  A deviation_scale_[N];
  A rest_[N];
  A offset_[N];
};

/// What is written of a channel's sums.
template <typename A>
__device__ inline void write_sums(const BackwardArgs& args, int64_t channel, const GradientSums& sums) {
  if (args.dbias) {
    static_cast<A*>(args.dbias)[channel] = static_cast<A>(sums.g);
  }
  if (args.dweight) {
    const double rstd = channel_value<A>(args.saved, 2 * args.shape.channels + channel);
    static_cast<A*>(args.dweight)[channel] = static_cast<A>(sums.gx * rstd);
  }
  if (args.sums) {
    args.sums[channel] = sums.g;
    args.sums[args.shape.channels + channel] = sums.gx;
  }
}

}  // namespace momentum_bn::kernels::cuda
