#pragma once

#include "kernels/cuda/kernels.h"

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>

// How the kernels are launched: pure functions of type, shape and device.

namespace momentum_bn::kernels::cuda {

/// How the values are shared out. Consecutive values that a thread reads at once are a vector. A column is what lies in
/// memory at a distance: the vectors of one channel where these are planes, and where they are rows ([outer][channels])
/// those of `vector` neighbouring channels. A tile is some neighbouring columns, `height` threads each; its positions
/// are split among `slices` blocks. Blocks are tiles in x and slices in y.
struct Tiling {
  bool rows;
  int vector;
  int64_t channels;
  int64_t inner;
  int64_t columns;
  int64_t positions;  // vectors per column
  int width;          // columns per tile
  int height;
  int channels_per_tile;
  int64_t tiles;
  int64_t slices;
  int64_t positions_per_slice;
  // From a thread's position to its next one, `height` on: so many values, so many vectors within the plane, and at the
  // end of a plane so many values more. Rows have no planes.
  int64_t step;
  int64_t plane;
  int64_t step_in_plane;
  int64_t skip;

  int threads() const { return width * height; }
  int64_t blocks() const { return tiles * slices; }
};

/// Threads per block, at most.
constexpr int kThreads = 256;
/// Blocks that run on a multiprocessor at a time, at least: the kernels keep to as few registers.
constexpr int kBlocksPerMultiprocessor = 2;
/// Vectors that a thread reads before it waits for the first, at least.
constexpr int kBatch = 4;

/// Values that can be read at once: 16 or 8 bytes' worth where sizes and the addresses given (which may be null) are
/// multiples of it, else 1.
int vector_of(Type type, const Shape& shape, std::initializer_list<const void*> addresses);

/// The same backward: of rows at most kMostInRowsBackward, as the sums of more channels leave too few registers.
int backward_vector_of(Type type, const Shape& shape, std::initializer_list<const void*> addresses);
constexpr int kMostInRowsBackward = 4;

/// Blocks that fill the device, each a few vectors of work per thread.
Tiling tiling_of(const Shape& shape, int vector, const Device& device);

/// Whether as many values are written as are read and both do not fit in the device's cache: what is written would push
/// out what is read once more.
bool overflows_cache(Type type, const Shape& shape, const Device& device);

/// Shared memory that sums over a tile take.
int64_t sums_bytes(const Tiling& tiling);

/// How many values are kept on chip for each value of x: x itself, and backward the gradient of y.
constexpr int kKeptForward = 1;
constexpr int kKeptBackward = 2;

/// A tiling for one launch that keeps the values on chip from the sums to y, or to dx: each block those of its part of
/// a tile, in shared memory, and the slices of a tile are a thread-block cluster. None where they do not fit.
std::optional<Tiling> on_chip_tiling_of(Type type, const Shape& shape, int vector, const Device& device, int kept);

/// Blocks of such a cluster, at most: any device with clusters can launch so many.
constexpr int kMostInCluster = 8;

/// Threads per block of that launch, at most.
constexpr int kOnChipThreads = 512;

/// Where things lie in a block's shared memory there, in bytes; sums_bytes() come first. Backward, `moments` and
/// `coefficients` together have room for kGradientNumbers per channel.
struct OnChipMemory {
  int64_t sums;          // two doubles per channel: of this block, read by its cluster
  int64_t moments;       // three doubles per channel: of the batch
  int64_t coefficients;  // three doubles per channel
  int64_t values;        // `kept` parts of values_bytes
  int64_t values_bytes;
  int64_t bytes;
};

OnChipMemory on_chip_memory_of(Type type, const Tiling& tiling, int kept);

/// What dx is formed with: numbers per channel.
constexpr int kGradientNumbers = 6;

/// Partial sums of all slices, and after them what each channel is normalised with, or kGradientNumbers.
struct WorkspaceLayout {
  size_t partials_bytes;
  size_t coefficients_bytes;
};

WorkspaceLayout workspace_of(Type type, const Tiling& tiling);

}  // namespace momentum_bn::kernels::cuda
