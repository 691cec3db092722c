// Forward in one launch: every value is read once and stays in shared memory until it is normalised. Tiles are divided
// among the blocks of a cluster, which read each other's sums.

#include "kernels/cuda/on_chip.h"

#include "kernels/cuda/blend.h"
#include "kernels/cuda/moments.h"
#include "kernels/cuda/normalize.h"
#include "kernels/cuda/start.h"
#include "kernels/cuda/tile.h"

namespace momentum_bn::kernels::cuda {
inline namespace forward_on_chip_kernels {

struct OnChipParameters {
  ForwardArgs args;
  Tiling tiling;
  OnChipMemory memory;
};

/// What the threads of a block do one after the other for their tile's channels.
template <typename T, int V, bool kRows>
class TileBlend {
  using A = Accumulate<T>;
  static constexpr int N = kChannelsOf<kRows, V>;

 public:
  __device__ explicit TileBlend(const OnChipParameters& p)
      : p_(p),
        sums_(p.tiling, shared_memory() + p.memory.sums),
        moments_(reinterpret_cast<BatchMoments*>(shared_memory() + p.memory.moments)),
        coefficients_(reinterpret_cast<Coefficients<A>*>(shared_memory() + p.memory.coefficients)) {}

  /// Brings the sums of all blocks together. What the sums were formed around is read before, as y may take the place
  /// of x; what the blend reads is asked for, so that it comes while the blocks wait for each other.
  __device__ void exchange(const ThreadSums<N>& sums, const Place& place) const {
    sums_.for_channels([&](int64_t channel, int i) {
      ChannelBlend<A>::prefetch_inputs(p_.args, channel);
      moments_[i].mean = Moments<T, V, kRows>::shift_of(p_.tiling, p_.args.x, channel);
    });
    sums_.exchange(sums, place);
  }

  /// Blends all channels, in every block alike. Nothing that others read is written.
  __device__ void blend() const {
    sums_.for_channels([&](int64_t channel, int i) {
      double merged[2];
      sums_.merge(i, merged);
      moments_[i] = Moments<T, V, kRows>::of_channel(p_.tiling, moments_[i].mean, merged);
      const ChannelBlend<A> blend(p_.args, channel, moments_[i]);
      coefficients_[i] = blend.coefficients();
      if (sums_.is_first()) {
        blend.save();
      }
    });
    // Behind this the state is not read any more either.
    sums_.release();
  }

  /// Returns the coefficients of this thread's channels.
  __device__ ThreadCoefficients<A, N> coefficients(const Place& place) const {
    return ThreadCoefficients<A, N>(coefficients_ + place.column * N);
  }

  /// When no block of the cluster reads the state any more, nor this one's sums, takes the batch into the state.
  __device__ void update() const {
    sums_.wait_for_others();
    if (!sums_.is_first()) {
      return;
    }
    sums_.for_channels([&](int64_t channel, int i) { ChannelBlend<A>(p_.args, channel, moments_[i]).update(); });
    finish_state(p_.args, p_.tiling.tiles);
  }

 private:
  const OnChipParameters& p_;
  TileSums<N> sums_;
  BatchMoments* moments_;
  Coefficients<A>* coefficients_;
};

template <typename T, int V, bool kRows>
__global__ void __launch_bounds__(kOnChipThreads, 1)
    forward_on_chip_kernel(const __grid_constant__ OnChipParameters p) {
  const Tiling& tiling = p.tiling;
  const auto place = Place::of<kRows>(tiling);
  const int64_t tile = blockIdx.x;
  const Walk<kRows, V> walk(tiling, tile, blockIdx.y, place);
  unsigned char* values = shared_memory() + p.memory.values;
  ThreadSums<kChannelsOf<kRows, V>> sums;
  if (walk.left > 0) {
    Moments<T, V, kRows> moments(tiling, p.args.x, channel_of<kRows, V>(tiling, tile, place));
    KeptVectors<T, V> kept(values);
    moments.add(walk, [&](const Vector<T, V>& vector) { kept.put(vector); });
    sums = moments.sums;
  }
  sums.merge_lanes(tiling, place);

  const TileBlend<T, V, kRows> tile_blend(p);
  tile_blend.exchange(sums, place);
  tile_blend.blend();
  if (walk.left > 0) {
    const auto coefficients = tile_blend.coefficients(place);
    KeptVectors<T, V> kept(values);
    Normalize<T, V, kRows>(p.args, coefficients, /*y_is_for_later=*/false).run(tiling, walk, [&](int64_t) {
      return kept.take();
    });
  }
  tile_blend.update();
}

}  // namespace forward_on_chip_kernels

int forward_on_chip(const ForwardArgs& args, const Tiling& tiling) {
  const OnChipParameters p = {args, tiling, on_chip_memory_of(args.type, tiling, kKeptForward)};
  Grid grid = Grid::of(tiling);
  grid.shared_bytes = p.memory.bytes;
  grid.cluster = static_cast<int>(tiling.slices);
  return with_tiling(args.type, tiling, [&]<typename T, int V, bool kRows>() {
    return start(forward_on_chip_kernel<T, V, kRows>, grid, args.stream, p);
  });
}

}  // namespace momentum_bn::kernels::cuda
