// Backward through the statistics in one launch: x and the gradient of y are read once and stay in shared memory until
// dx is formed. Tiles are divided among the blocks of a cluster, which read each other's sums.

#include "kernels/cuda/gradient.h"
#include "kernels/cuda/on_chip.h"
#include "kernels/cuda/start.h"
#include "kernels/cuda/tile.h"

namespace momentum_bn::kernels::cuda {
inline namespace backward_on_chip_kernels {

struct OnChipParameters {
  BackwardArgs args;  // dx is null: only dresidual is written while the sums are made
  void* dx;
  Tiling tiling;
  OnChipMemory memory;
};

template <typename T, int V, bool kRows, Mask kMask>
__global__ void __launch_bounds__(kOnChipThreads, 1)
    backward_on_chip_kernel(const __grid_constant__ OnChipParameters p) {
  using A = Accumulate<T>;
  using Vectors = BackwardVectors<T, V>;
  constexpr int N = kChannelsOf<kRows, V>;
  const Tiling& tiling = p.tiling;
  const auto place = Place::of<kRows>(tiling);
  const int64_t tile = blockIdx.x;
  const Walk<kRows, V> walk(tiling, tile, blockIdx.y, place);
  unsigned char* const values = shared_memory() + p.memory.values;
  ThreadSums<N> sums;
  if (walk.left > 0) {
    ThreadGradientSums<T, V, kRows, kMask> of_thread(p.args, channel_of<kRows, V>(tiling, tile, place));
    KeptVectors<T, V> x(values);
    KeptVectors<T, V> gradient(values + p.memory.values_bytes);
    of_thread.run(tiling, walk, [&](const A(&g)[V], const Vectors& vectors) {
      Vector<T, V> vector;
      vector.set(g);
      gradient.put(vector);
      x.put(vectors.x);
    });
    sums = of_thread.sums;
  }
  sums.merge_lanes(tiling, place);

  const TileSums<N> of_tile(tiling, shared_memory() + p.memory.sums);
  of_tile.exchange(sums, place);
  auto* const gradients = reinterpret_cast<ChannelGradient<A>*>(shared_memory() + p.memory.moments);
  of_tile.for_channels([&](int64_t channel, int i) {
    double merged[2];
    of_tile.merge(i, merged);
    const auto exact = gradient_sums_of(saved_of<A>(p.args, channel), merged[0], merged[1]);
    gradients[i] = ChannelGradient<A>::of(p.args, channel, exact);
    if (of_tile.is_first()) {
      write_sums<A>(p.args, channel, exact);
    }
  });
  of_tile.release();

  if (walk.left > 0) {
    const InputGradient<T, V, kRows, Mask::kNone> input_gradient(p.dx, /*dx_is_for_later=*/false, /*has_y=*/false,
                                                                 gradients + place.column * N);
    KeptVectors<T, V> x(values);
    KeptVectors<T, V> gradient(values + p.memory.values_bytes);
    input_gradient.run(tiling, walk, [&](int64_t) { return Vectors{gradient.take(), x.take(), {}}; });
  }
  of_tile.wait_for_others();
}

}  // namespace backward_on_chip_kernels

int backward_on_chip(const BackwardArgs& args, const Tiling& tiling) {
  OnChipParameters p = {args, args.dx, tiling, on_chip_memory_of(args.type, tiling, kKeptBackward)};
  p.args.dx = nullptr;
  Grid grid = Grid::of(tiling);
  grid.shared_bytes = p.memory.bytes;
  grid.cluster = static_cast<int>(tiling.slices);
  return with_mask(args, [&]<Mask kMask>() {
    return with_backward_tiling(args.type, tiling, [&]<typename T, int V, bool kRows>() {
      return start(backward_on_chip_kernel<T, V, kRows, kMask>, grid, args.stream, p);
    });
  });
}

}  // namespace momentum_bn::kernels::cuda
