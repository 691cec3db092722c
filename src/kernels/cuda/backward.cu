// Backward. With constant statistics in one launch: dx and dresidual are written while the sums are made, whose parts
// the last block of each tile to end merges. Through the statistics in two: the sums, then dx.

#include "kernels/cuda/gradient.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/on_chip.h"
#include "kernels/cuda/start.h"

namespace momentum_bn::kernels::cuda {
inline namespace backward_kernels {

struct BackwardParameters {
  BackwardArgs args;
  Tiling tiling;
  double* partials;
  void* gradients;  // ChannelGradient<A>[channels], or null
  bool dx_is_for_later;
};

template <typename A>
__device__ ChannelGradient<A>* gradients_of(const BackwardParameters& p) {
  return static_cast<ChannelGradient<A>*>(p.gradients);
}

/// The sums, and what is written beside them.
template <typename T, int V, bool kRows, Mask kMask>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    sums_kernel(const __grid_constant__ BackwardParameters p) {
  using A = Accumulate<T>;
  const Tiling& tiling = p.tiling;
  const auto place = Place::of<kRows>(tiling);
  const int64_t tile = blockIdx.x;
  const Walk<kRows, V> walk(tiling, tile, blockIdx.y, place);
  ThreadSums<kChannelsOf<kRows, V>> sums;
  if (walk.left > 0) {
    ThreadGradientSums<T, V, kRows, kMask> of_thread(p.args, channel_of<kRows, V>(tiling, tile, place));
    of_thread.run(tiling, walk, [](const A(&)[V], const BackwardVectors<T, V>&) {});
    sums = of_thread.sums;
  }
  if (!p.args.dweight && !p.args.dbias && !p.args.sums && !p.gradients) {
    return;
  }
  sums.merge_lanes(tiling, place);
  if (!sums.merge_slices(tiling, place, p.partials, p.args.counters + 1 + tile)) {
    return;
  }
  for_channels_of_tile(tiling, [&](int64_t channel, const double* of_channel) {
    const auto exact = gradient_sums_of(saved_of<A>(p.args, channel), of_channel[0], of_channel[1]);
    write_sums<A>(p.args, channel, exact);
    if (p.gradients) {
      gradients_of<A>(p)[channel] = ChannelGradient<A>::of(p.args, channel, exact);
    }
  });
}

/// What dx is formed with, from given sums.
template <typename A>
__global__ void __launch_bounds__(kThreads) given_sums_kernel(const __grid_constant__ BackwardParameters p) {
  const int64_t channels = p.args.shape.channels;
  const int64_t channel = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (channel >= channels) {
    return;
  }
  const GradientSums sums = {p.args.sums[channel], p.args.sums[channels + channel]};
  gradients_of<A>(p)[channel] = ChannelGradient<A>::of(p.args, channel, sums);
}

template <typename T, int V, bool kRows, Mask kMask>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    input_gradient_kernel(const __grid_constant__ BackwardParameters p) {
  const Tiling& tiling = p.tiling;
  const auto place = Place::of<kRows>(tiling);
  // The blocks go backwards: what was read last is most likely still in the cache.
  const int64_t tile = gridDim.x - 1 - blockIdx.x;
  const Walk<kRows, V, /*kBack=*/true> walk(tiling, tile, gridDim.y - 1 - blockIdx.y, place);
  if (walk.left == 0) {
    return;
  }
  const InputGradient<T, V, kRows, kMask> gradient(
      p.args.dx, p.dx_is_for_later, p.args.y,
      gradients_of<Accumulate<T>>(p) + channel_of<kRows, V>(tiling, tile, place));
  gradient.run(tiling, walk, [&](int64_t at) { return BackwardVectors<T, V>::load(p.args, at); });
}

int start_sums(const BackwardParameters& p) {
  return with_mask(p.args, [&]<Mask kMask>() {
    return with_backward_tiling(p.args.type, p.tiling, [&]<typename T, int V, bool kRows>() {
      return start(sums_kernel<T, V, kRows, kMask>, Grid::of(p.tiling), p.args.stream, p);
    });
  });
}

int start_given_sums(const BackwardParameters& p) {
  const Grid grid = {(p.args.shape.channels + kThreads - 1) / kThreads, 1, kThreads, 0};
  if (p.args.type == Type::kDouble) {
    return start(given_sums_kernel<double>, grid, p.args.stream, p);
  }
  return start(given_sums_kernel<float>, grid, p.args.stream, p);
}

int start_input_gradient(const BackwardParameters& p) {
  return with_mask(p.args, [&]<Mask kMask>() {
    return with_backward_tiling(p.args.type, p.tiling, [&]<typename T, int V, bool kRows>() {
      return start(input_gradient_kernel<T, V, kRows, kMask>, Grid::of(p.tiling), p.args.stream, p);
    });
  });
}

int vector_of(const BackwardArgs& args) {
  return backward_vector_of(args.type, args.shape, {args.dy, args.x, args.y, args.dx, args.dresidual});
}

/// @param with_gradients  what dx through the statistics is formed with goes to the workspace
BackwardParameters parameters_of(const BackwardArgs& args, const Device& device, bool with_gradients) {
  BackwardParameters p = {args, tiling_of(args.shape, vector_of(args), device), nullptr, nullptr, false};
  p.partials = static_cast<double*>(args.workspace);
  if (with_gradients) {
    p.gradients = static_cast<char*>(args.workspace) + workspace_of(args.type, p.tiling).partials_bytes;
    p.dx_is_for_later = overflows_cache(args.type, args.shape, device);
  }
  return p;
}

int sums_then_input_gradient(const BackwardArgs& args, const Device& device) {
  auto p = parameters_of(args, device, /*with_gradients=*/true);
  p.args.dx = nullptr;
  if (const int error = start_sums(p)) {
    return error;
  }
  p.args.dx = args.dx;
  if (args.dresidual) {  // it is g
    p.args.dy = args.dresidual;
    p.args.y = nullptr;
    p.args.relu = false;
  }
  return start_input_gradient(p);
}

}  // namespace backward_kernels

int backward(const BackwardArgs& args, const Device& device) {
  if (!args.through_statistics || !args.dx) {
    return start_sums(parameters_of(args, device, /*with_gradients=*/false));
  }
  const auto tiling = on_chip_tiling_of(args.type, args.shape, vector_of(args), device, kKeptBackward);
  std::function<int()> on_chip;
  if (tiling) {
    on_chip = [&] { return backward_on_chip(args, *tiling); };
  }
  return go(on_chip, [&] { return sums_then_input_gradient(args, device); });
}

int gradient_sums(const BackwardArgs& args, const Device& device) {
  return start_sums(parameters_of(args, device, /*with_gradients=*/false));
}

int gradient_of_input(const BackwardArgs& args, const Device& device) {
  const auto p = parameters_of(args, device, /*with_gradients=*/true);
  if (const int error = start_given_sums(p)) {
    return error;
  }
  return start_input_gradient(p);
}

}  // namespace momentum_bn::kernels::cuda
