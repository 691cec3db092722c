#include "kernels/cuda/launch.h"

#include <algorithm>

namespace momentum_bn::kernels::cuda {
namespace {

constexpr int64_t kVectorBytes = 16;
/// Of grid y.
constexpr int64_t kMostSlices = 65'535;

int64_t size_of(Type type) { return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2; }

int64_t quotient_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

int64_t power_of_two_up(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

/// A single channel is one plane, whatever its dimensions are called.
Shape with_planes(const Shape& shape) {
  return shape.channels == 1 ? Shape{1, 1, std::max<int64_t>(1, shape.outer * shape.inner)} : shape;
}

/// Threads for the columns of planes: each of a few vectors, whole warps where there is enough.
int height_of_planes(int64_t positions) {
  constexpr int64_t kWarp = 32;
  if (positions <= kWarp) return static_cast<int>(power_of_two_up(positions));
  return static_cast<int>(std::clamp<int64_t>(power_of_two_up(positions / kBatch), kWarp, kThreads));
}

/// Columns of rows: a warp's reads, divided evenly among the tiles.
int width_of_rows(int64_t columns) {
  constexpr int64_t kMost = 32;
  return static_cast<int>(quotient_up(columns, quotient_up(columns, kMost)));
}

/// So many slices that the blocks come to whole waves, as nearly as may be.
int64_t slices_of(int64_t tiles, int64_t most, const Device& device) {
  constexpr int64_t kBlocksPerMultiprocessor = 4;
  constexpr int64_t kMostWaves = 4;
  if (tiles >= kCounters) return 1;
  const int64_t wave = device.multiprocessors *
                       std::min<int64_t>(kBlocksPerMultiprocessor, device.threads_per_multiprocessor / kThreads);
  int64_t best = 1;
  double best_use = 0;
  for (int64_t waves = 1; waves <= kMostWaves; ++waves) {
    const int64_t slices = std::clamp<int64_t>(waves * wave / tiles, 1, std::min(most, kMostSlices));
    const int64_t blocks = tiles * slices;
    const double use = static_cast<double>(blocks) / static_cast<double>(quotient_up(blocks, wave) * wave);
    if (use > best_use + 0.05) {
      best = slices;
      best_use = use;
    }
  }
  return best;
}

void set_steps(Tiling& tiling, const Shape& shape) {
  if (tiling.rows) {
    tiling.step = tiling.height * shape.channels;
    return;
  }
  tiling.plane = shape.inner / tiling.vector;
  tiling.step_in_plane = tiling.height % tiling.plane;
  tiling.step = tiling.height / tiling.plane * shape.channels * shape.inner + tiling.step_in_plane * tiling.vector;
  tiling.skip = (shape.channels - 1) * shape.inner;
}

void set_slices(Tiling& tiling, int64_t slices) {
  tiling.positions_per_slice = quotient_up(quotient_up(tiling.positions, slices), tiling.height) * tiling.height;
  tiling.slices = quotient_up(tiling.positions, tiling.positions_per_slice);
}

}  // namespace

int vector_of(Type type, const Shape& any_shape, std::initializer_list<const void*> addresses) {
  const Shape shape = with_planes(any_shape);
  const int64_t vector = kVectorBytes / size_of(type);
  if ((shape.inner > 1 ? shape.inner : shape.channels) % vector != 0) return 1;
  for (const void* address : addresses) {
    if (reinterpret_cast<uintptr_t>(address) % kVectorBytes != 0) return 1;
  }
  return static_cast<int>(vector);
}

Tiling tiling_of(const Shape& any_shape, int vector, const Device& device) {
  const Shape shape = with_planes(any_shape);
  Tiling tiling = {};
  tiling.rows = shape.inner == 1 && shape.channels > 1;
  tiling.vector = vector;
  tiling.channels = shape.channels;
  tiling.inner = shape.inner;
  tiling.columns = tiling.rows ? shape.channels / vector : shape.channels;
  tiling.positions = std::max<int64_t>(1, tiling.rows ? shape.outer : shape.values_per_channel() / vector);
  if (tiling.rows) {
    tiling.width = width_of_rows(tiling.columns);
    tiling.height = static_cast<int>(std::min<int64_t>(kThreads / tiling.width, power_of_two_up(tiling.positions)));
  } else {
    tiling.height = height_of_planes(tiling.positions);
    tiling.width = static_cast<int>(std::min<int64_t>(kThreads / tiling.height, tiling.columns));
  }
  tiling.channels_per_tile = tiling.width * (tiling.rows ? vector : 1);
  tiling.tiles = quotient_up(tiling.columns, tiling.width);
  set_slices(tiling,
             slices_of(tiling.tiles, std::max<int64_t>(1, tiling.positions / (kBatch * tiling.height)), device));
  set_steps(tiling, shape);
  return tiling;
}

int64_t sums_bytes(const Tiling& tiling) {
  constexpr int64_t kSums = 2 * sizeof(double);
  return std::max<int64_t>(1, quotient_up(tiling.height, 2)) * tiling.channels_per_tile * kSums;
}

WorkspaceLayout workspace_of(Type type, const Tiling& tiling) {
  const auto channels = static_cast<size_t>(tiling.channels);
  const size_t partials = tiling.slices == 1 ? 0 : static_cast<size_t>(tiling.slices) * channels * 2 * sizeof(double);
  return {partials, 3 * channels * (type == Type::kDouble ? sizeof(double) : sizeof(float))};
}

size_t forward_workspace_bytes(Type type, const Shape& shape, const Device& device) {
  size_t most = 0;
  for (const int vector : {1, vector_of(type, shape, {})}) {
    const auto layout = workspace_of(type, tiling_of(shape, vector, device));
    most = std::max(most, layout.partials_bytes + layout.coefficients_bytes);
  }
  return most;
}

size_t backward_workspace_bytes(Type type, const Shape& shape, const Device& device) {
  return forward_workspace_bytes(type, shape, device);
}

}  // namespace momentum_bn::kernels::cuda
