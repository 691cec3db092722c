// Backward: dx and dresidual are written while the sums are made, whose parts the last block of each tile to end
// merges.

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/start.h"
#include "kernels/cuda/sums.h"

namespace momentum_bn::kernels::cuda {
namespace {

struct BackwardParameters {
  BackwardArgs args;
  Tiling tiling;
  double* partials;
};

/// A thread's sums of g and g * (x - mean), in the accumulate type over a run of a few values, in double over runs.
template <typename T, int V, bool kRows>
class GradientSums {
  using A = Accumulate<T>;
  static constexpr int N = kChannelsOf<kRows, V>;

 public:
  /// Of the channels from `channel` on, which exist.
  __device__ GradientSums(const BackwardArgs& args, int64_t channel) : args_(args) {
    const int64_t channels = args.shape.channels;
    const A* saved = static_cast<const A*>(args.saved) + channel;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      center_[j] = saved[j];
      const double rstd = static_cast<double>(saved[2 * channels + j]);
      scale_[j] = static_cast<A>(args.weight ? channel_value<A>(args.weight, channel + j) * rstd : rstd);
    }
  }

  __device__ void run(const Tiling& tiling, Walk<kRows, V> walk) {
    while (walk.left > 0) {
      Run run;
#pragma unroll 1
      for (int batch = 0; batch < kBatchesPerRun && walk.left > 0; ++batch) add_batch(run, tiling, walk);
      take(run);
    }
  }

  ThreadSums<N> sums;

 private:
  struct Run {
    A g[V] = {};
    A gx[V] = {};
  };
  /// The sums of many channels leave few registers.
  static constexpr int K = N >= 8 ? kBatch / 2 : kBatchOf<T, V>;
  using Vectors = Vector<T, V>[K];
  /// So that 64 values are added up in the accumulate type.
  static constexpr int kBatchesPerRun = 64 / K;

  __device__ static void load(Vectors& to, const void* from, const int64_t (&at)[K], int count) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k < count) to[k] = Vector<T, V>::load(from, at[k]);
    }
  }

  __device__ void add_batch(Run& run, const Tiling& tiling, Walk<kRows, V>& walk) const {
    int64_t at[K];
    const int count = walk.next_batch(tiling, at);
    Vectors dy;
    Vectors x;
    Vectors y;
    load(dy, args_.dy, at, count);
    if (args_.x) load(x, args_.x, at, count);
    if (args_.y) load(y, args_.y, at, count);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k < count) add_vector(run, dy[k], x[k], y[k], at[k]);
    }
  }

  __device__ void add_vector(Run& run, const Vector<T, V>& dy, const Vector<T, V>& x, const Vector<T, V>& y,
                             int64_t at) const {
    A g[V];
    dy.get(g);
    if (args_.y) {
      A outputs[V];
      y.get(outputs);
#pragma unroll
      for (int j = 0; j < V; ++j) g[j] = outputs[j] <= 0 ? 0 : g[j];
    }
    if (args_.x) {
      A inputs[V];
      x.get(inputs);
#pragma unroll
      for (int j = 0; j < V; ++j) run.gx[j] += g[j] * (inputs[j] - center_[kRows ? j : 0]);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) run.g[j] += g[j];
    if (args_.dresidual) write(args_.dresidual, g, at);
    if (args_.dx) {
#pragma unroll
      for (int j = 0; j < V; ++j) g[j] *= scale_[kRows ? j : 0];
      write(args_.dx, g, at);
    }
  }

  __device__ static void write(void* to, const A (&values)[V], int64_t at) {
    Vector<T, V> vector;
    vector.set(values);
    vector.store(to, at);
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
  A center_[N];
  A scale_[N];
};

template <typename A>
__device__ void write_gradients(const BackwardArgs& args, int64_t channel, const double* sums) {
  const int64_t channels = args.shape.channels;
  if (args.dbias) static_cast<A*>(args.dbias)[channel] = static_cast<A>(sums[0]);
  if (!args.dweight) return;
  const double rest = channel_value<A>(args.saved, channels + channel);
  const double rstd = channel_value<A>(args.saved, 2 * channels + channel);
  static_cast<A*>(args.dweight)[channel] = static_cast<A>((sums[1] - rest * sums[0]) * rstd);
}

template <typename T, int V, bool kRows>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const __grid_constant__ BackwardParameters p) {
  const Tiling& tiling = p.tiling;
  const auto place = Place::of<kRows>(tiling);
  const int64_t tile = blockIdx.x;
  const Walk<kRows, V> walk(tiling, tile, blockIdx.y, place);
  ThreadSums<kChannelsOf<kRows, V>> sums;
  if (walk.left > 0) {
    GradientSums<T, V, kRows> of_thread(p.args, channel_of<kRows, V>(tiling, tile, place));
    of_thread.run(tiling, walk);
    sums = of_thread.sums;
  }
  if (!p.args.dweight && !p.args.dbias) return;
  sums.merge_lanes(tiling, place);
  if (!sums.merge_slices(tiling, place, p.partials, p.args.counters + 1 + tile)) return;
  for_channels_of_tile(tiling, sums, place, [&](int64_t channel, const double* of_channel) {
    write_gradients<Accumulate<T>>(p.args, channel, of_channel);
  });
}

}  // namespace

int backward(const BackwardArgs& args, const Device& device) {
  const int vector = vector_of(args.type, args.shape, {args.dy, args.x, args.y, args.dx, args.dresidual});
  const BackwardParameters p = {args, tiling_of(args.shape, vector, device), static_cast<double*>(args.workspace)};
  return with_tiling(args.type, p.tiling, [&]<typename T, int V, bool kRows>() {
    return start(backward_kernel<T, V, kRows>, Grid::of(p.tiling), args.stream, p);
  });
}

}  // namespace momentum_bn::kernels::cuda
