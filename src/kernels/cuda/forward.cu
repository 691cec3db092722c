// Forward: statistics, blend, state and y, in two launches: the blocks of the first share the channels' values, and the
// last of each tile to end merges their sums and blends; the second normalises.

#include "kernels/cuda/blend.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/moments.h"
#include "kernels/cuda/normalize.h"
#include "kernels/cuda/on_chip.h"
#include "kernels/cuda/start.h"

namespace momentum_bn::kernels::cuda {
inline namespace forward_kernels {

struct ForwardParameters {
  ForwardArgs args;
  Tiling tiling;
  double* partials;
  void* coefficients;  // Coefficients<A>[channels]
  double* statistics;  // or null: as StatisticsArgs have it, and nothing else is written
  bool y_is_for_later;
};

/// What is left to do with the statistics of a channel.
template <typename A>
__device__ void finish_channel(const ForwardParameters& p, int64_t channel, const BatchMoments& batch) {
  if (p.statistics) {
    const int64_t channels = p.args.shape.channels;
    p.statistics[channel] = batch.mean;
    p.statistics[channels + channel] = batch.m2;
    if (channel == 0) {
      p.statistics[2 * channels] = batch.count;
    }
    return;
  }
  const ChannelBlend<A> blend(p.args, channel, batch);
  static_cast<Coefficients<A>*>(p.coefficients)[channel] = blend.coefficients();
  blend.save();
  blend.update();
}

template <typename T, int V, bool kRows>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    statistics_kernel(const __grid_constant__ ForwardParameters p) {
  const Tiling& tiling = p.tiling;
  const auto place = Place::of<kRows>(tiling);
  const int64_t tile = blockIdx.x;
  const Walk<kRows, V> walk(tiling, tile, blockIdx.y, place);
  ThreadSums<kChannelsOf<kRows, V>> sums;
  if (walk.left > 0) {
    Moments<T, V, kRows> moments(tiling, p.args.x, channel_of<kRows, V>(tiling, tile, place));
    moments.add(walk, [](const Vector<T, V>&) {});
    sums = moments.sums;
  }
  sums.merge_lanes(tiling, place);
  if (!sums.merge_slices(tiling, place, p.partials, p.args.counters + 1 + tile)) {
    return;
  }
  for_channels_of_tile(tiling, [&](int64_t channel, const double* of_channel) {
    using OfTile = Moments<T, V, kRows>;
    const auto batch = OfTile::of_channel(tiling, OfTile::shift_of(tiling, p.args.x, channel), of_channel);
    finish_channel<Accumulate<T>>(p, channel, batch);
  });
  if (!p.statistics) {
    finish_state(p.args, tiling.tiles);
  }
}

template <typename T, int V, bool kRows>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    normalize_kernel(const __grid_constant__ ForwardParameters p) {
  using A = Accumulate<T>;
  const Tiling& tiling = p.tiling;
  const auto place = Place::of<kRows>(tiling);
  // The blocks go backwards: what was read last is most likely still in the cache.
  const int64_t tile = gridDim.x - 1 - blockIdx.x;
  const int64_t slice = gridDim.y - 1 - blockIdx.y;
  const Walk<kRows, V, /*kBack=*/true> walk(tiling, tile, slice, place);
  if (walk.left == 0) {
    return;
  }
  const auto* of_channel =
      static_cast<const Coefficients<A>*>(p.coefficients) + channel_of<kRows, V>(tiling, tile, place);
  const ThreadCoefficients<A, kChannelsOf<kRows, V>> coefficients(of_channel);
  Normalize<T, V, kRows>(p.args, coefficients, p.y_is_for_later).run(tiling, walk, [&](int64_t at) {
    return Vector<T, V>::load(p.args.x, at);
  });
}

/// Merges the statistics of all ranks, in their order.
__device__ BatchMoments merged_ranks(const ForwardArgs& args, int64_t channel) {
  const int64_t channels = args.shape.channels;
  BatchMoments all = {0, 0, 0};
  for (int64_t rank = 0; rank < args.ranks; ++rank) {
    const double* row = args.gathered + rank * (2 * channels + 1);
    merge(all, {row[channel], row[channels + channel], row[2 * channels]});
  }
  return all;
}

template <typename A>
__global__ void __launch_bounds__(kThreads) gathered_kernel(const __grid_constant__ ForwardParameters p) {
  const int64_t channels = p.args.shape.channels;
  const int64_t channel = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const auto batch = merged_ranks(p.args, channel < channels ? channel : 0);
  if (batch.count == 0) {
    const int rows = p.args.through_statistics ? 6 : 3;
    for (int row = 0; row < rows && channel < channels; ++row) {
      static_cast<A*>(p.args.saved)[row * channels + channel] = 0;
    }
    return;
  }
  if (channel < channels) {
    finish_channel<A>(p, channel, batch);
  }
  finish_state(p.args, gridDim.x);
}

ForwardParameters parameters_of(const ForwardArgs& args, const Tiling& tiling) {
  ForwardParameters p = {args, tiling, nullptr, nullptr, nullptr, false};
  p.partials = static_cast<double*>(args.workspace);
  p.coefficients = static_cast<char*>(args.workspace) + workspace_of(args.type, tiling).partials_bytes;
  return p;
}

int start_statistics(const ForwardParameters& p) {
  return with_tiling(p.args.type, p.tiling, [&]<typename T, int V, bool kRows>() {
    return start(statistics_kernel<T, V, kRows>, Grid::of(p.tiling), p.args.stream, p);
  });
}

int start_normalize(const ForwardParameters& p) {
  return with_tiling(p.args.type, p.tiling, [&]<typename T, int V, bool kRows>() {
    return start(normalize_kernel<T, V, kRows>, Grid::of(p.tiling), p.args.stream, p);
  });
}

int start_gathered(const ForwardParameters& p) {
  const Grid grid = {(p.args.shape.channels + kThreads - 1) / kThreads, 1, kThreads, 0};
  if (p.args.type == Type::kDouble) {
    return start(gathered_kernel<double>, grid, p.args.stream, p);
  }
  return start(gathered_kernel<float>, grid, p.args.stream, p);
}

int in_two_launches(const ForwardArgs& args, int vector, const Device& device) {
  auto p = parameters_of(args, tiling_of(args.shape, vector, device));
  p.y_is_for_later = overflows_cache(args.type, args.shape, device);
  const int error = args.gathered ? start_gathered(p) : start_statistics(p);
  if (error != 0 || args.shape.values() == 0) {
    return error;
  }
  return start_normalize(p);
}

}  // namespace forward_kernels

int forward(const ForwardArgs& args, const Device& device) {
  const int vector = vector_of(args.type, args.shape, {args.x, args.residual, args.y});
  if (args.gathered) {
    return in_two_launches(args, vector, device);
  }
  const auto tiling = on_chip_tiling_of(args.type, args.shape, vector, device, kKeptForward);
  std::function<int()> on_chip;
  if (tiling) {
    on_chip = [&] { return forward_on_chip(args, *tiling); };
  }
  return go(on_chip, [&] { return in_two_launches(args, vector, device); });
}

int statistics(const StatisticsArgs& args, const Device& device) {
  ForwardArgs all = {};
  all.type = args.type;
  all.shape = args.shape;
  all.x = args.x;
  all.workspace = args.workspace;
  all.counters = args.counters;
  all.stream = args.stream;
  auto p = parameters_of(all, tiling_of(args.shape, vector_of(args.type, args.shape, {args.x}), device));
  p.statistics = args.statistics;
  return start_statistics(p);
}

}  // namespace momentum_bn::kernels::cuda
