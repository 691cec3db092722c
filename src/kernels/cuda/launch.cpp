#include "kernels/cuda/launch.h"

#include <algorithm>

namespace momentum_bn::kernels::cuda {
namespace {

constexpr int64_t kVectorBytes = 16;
/// The most slices that grid y takes.
constexpr int64_t kMostSlices = 65'535;
constexpr int kFirstWithClusters = 90;
/// What the system takes of a multiprocessor's shared memory for each block.
constexpr int64_t kReservedBytes = 1024;
/// The registers of a multiprocessor.
constexpr int kRegisters = 65'536;
/// The most registers that a thread which keeps values on chip has.
constexpr int kOnChipRegisters = kRegisters / kOnChipThreads;

int64_t size_of(Type type) { return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2; }

int64_t quotient_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

int64_t power_of_two_up(int64_t value) {
  int64_t power = 1;
  while (power < value) {
    power *= 2;
  }
  return power;
}

/// A single channel is one plane, whatever its dimensions are called.
Shape with_planes(const Shape& shape) {
  return shape.channels == 1 ? Shape{1, 1, std::max<int64_t>(1, shape.outer * shape.inner)} : shape;
}

bool is_rows(const Shape& shape) { return shape.inner == 1 && shape.channels > 1; }

/// Threads for a column of planes: each of a few vectors, whole warps where there is enough.
int height_of_planes(int64_t positions, int most) {
  constexpr int64_t kWarp = 32;
  if (positions <= kWarp) {
    return static_cast<int>(std::min<int64_t>(power_of_two_up(positions), most));
  }
  return static_cast<int>(std::min<int64_t>(std::max(power_of_two_up(positions / kBatch), kWarp), most));
}

/// Columns of rows, divided evenly among the tiles: lines of the memory, and no more channels than need be, as the last
/// block of each tile adds up the sums of all slices.
int width_of_rows(int64_t columns, int vector) {
  constexpr int64_t kMostChannels = 64;
  const int64_t most = std::clamp<int64_t>(kMostChannels / vector, 8, 32);
  return static_cast<int>(quotient_up(columns, quotient_up(columns, most)));
}

/// Returns so many slices that the blocks come to whole waves, as nearly as may be.
int64_t slices_of(int64_t tiles, int64_t most, const Device& device) {
  // There are two at least, for kernels of which more blocks run at a time.
  constexpr int64_t kFewestWaves = 2;
  constexpr int64_t kMostWaves = 4;
  if (tiles >= kCounters) {
    return 1;
  }
  const int64_t wave = device.multiprocessors *
                       std::min<int64_t>(kBlocksPerMultiprocessor, device.threads_per_multiprocessor / kThreads);
  int64_t best = 1;
  double best_use = 0;
  for (int64_t waves = kFewestWaves; waves <= kMostWaves; ++waves) {
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

/// What does not depend on the device.
Tiling untiled(const Shape& shape, int vector) {
  Tiling tiling = {};
  tiling.rows = is_rows(shape);
  tiling.vector = vector;
  tiling.channels = shape.channels;
  tiling.inner = shape.inner;
  tiling.columns = tiling.rows ? shape.channels / vector : shape.channels;
  tiling.positions = std::max<int64_t>(1, tiling.rows ? shape.outer : shape.values_per_channel() / vector);
  return tiling;
}

/// What follows from width and height.
void set_tiles(Tiling& tiling, const Shape& shape) {
  tiling.channels_per_tile = tiling.width * (tiling.rows ? tiling.vector : 1);
  tiling.tiles = quotient_up(tiling.columns, tiling.width);
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

/// Threads for a column of rows.
int height_of_rows(int64_t positions, int width, int most) {
  return static_cast<int>(std::min<int64_t>(most / width, power_of_two_up(positions)));
}

/// A power of 2.
int widest_on_chip(const Tiling& untiled) {
  constexpr int64_t kMost = 32;
  return static_cast<int>(std::min(kMost, power_of_two_up(untiled.columns)));
}

/// Rows are not read in less than a sector of the memory.
int narrowest_on_chip(Type type, const Tiling& untiled) {
  constexpr int64_t kSectorBytes = 32;
  if (!untiled.rows) {
    return 1;
  }
  return static_cast<int>(std::min(power_of_two_up(untiled.columns), kSectorBytes / (untiled.vector * size_of(type))));
}

Tiling on_chip_tiling(const Shape& shape, int vector, int width, int cluster, int threads) {
  Tiling tiling = untiled(shape, vector);
  const int64_t positions = quotient_up(tiling.positions, cluster);
  tiling.width = static_cast<int>(std::min<int64_t>(width, tiling.columns));
  tiling.height = tiling.rows ? height_of_rows(positions, tiling.width, std::min(kThreads, threads))
                              : height_of_planes(positions, std::max(1, threads / tiling.width));
  set_tiles(tiling, shape);
  set_slices(tiling, cluster);
  return tiling;
}

/// One way to keep the values on chip.
struct OnChipChoice {
  Tiling tiling;
  bool fits;
  bool fills_device;
  /// One block reads while another writes.
  bool shares_multiprocessor;

  OnChipChoice(const Tiling& tiling_, int cluster, Type type, const Device& device, int kept) : tiling(tiling_) {
    // Less than this is not worth a cluster's barriers.
    const int64_t least_in_cluster = device.shared_memory_per_block / 16;
    const OnChipMemory memory = on_chip_memory_of(type, tiling, kept);
    const int64_t bytes = memory.bytes;
    fits = bytes <= device.shared_memory_per_block && tiling.slices == cluster &&
           (cluster == 1 || bytes - memory.values >= least_in_cluster);
    fills_device = tiling.blocks() >= device.multiprocessors;
    shares_multiprocessor = 2 * (bytes + kReservedBytes) <= device.shared_memory_per_multiprocessor &&
                            2 * tiling.threads() * kOnChipRegisters <= kRegisters;
  }

  bool is_better_than(const OnChipChoice& other) const {
    if (fills_device != other.fills_device) {
      return fills_device;
    }
    if (!fills_device && tiling.blocks() != other.tiling.blocks()) {
      return tiling.blocks() > other.tiling.blocks();
    }
    if (shares_multiprocessor != other.shares_multiprocessor) {
      return shares_multiprocessor;
    }
    if (tiling.slices != other.tiling.slices) {
      return tiling.slices < other.tiling.slices;
    }
    return tiling.width > other.tiling.width;
  }
};

}  // namespace

int vector_of(Type type, const Shape& any_shape, std::initializer_list<const void*> addresses) {
  const Shape shape = with_planes(any_shape);
  const int64_t neighbours = shape.inner > 1 ? shape.inner : shape.channels;
  const int64_t size = size_of(type);
  // Half as much is worth it for small values.
  for (const int64_t bytes : {kVectorBytes, size == 2 ? kVectorBytes / 2 : kVectorBytes}) {
    const bool is_aligned = std::all_of(addresses.begin(), addresses.end(), [&](const void* address) {
      return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0;
    });
    if (is_aligned && neighbours % (bytes / size) == 0) {
      return static_cast<int>(bytes / size);
    }
  }
  return 1;
}

int backward_vector_of(Type type, const Shape& shape, std::initializer_list<const void*> addresses) {
  const int vector = vector_of(type, shape, addresses);
  return is_rows(with_planes(shape)) ? std::min(vector, kMostInRowsBackward) : vector;
}

Tiling tiling_of(const Shape& any_shape, int vector, const Device& device) {
  const Shape shape = with_planes(any_shape);
  Tiling tiling = untiled(shape, vector);
  if (tiling.rows) {
    tiling.width = width_of_rows(tiling.columns, vector);
    tiling.height = height_of_rows(tiling.positions, tiling.width, kThreads);
  } else {
    tiling.height = height_of_planes(tiling.positions, kThreads);
    tiling.width = static_cast<int>(std::min<int64_t>(kThreads / tiling.height, tiling.columns));
  }
  set_tiles(tiling, shape);
  set_slices(tiling, slices_of(tiling.tiles, std::max<int64_t>(1, tiling.positions / kBatch / tiling.height), device));
  return tiling;
}

bool overflows_cache(Type type, const Shape& shape, const Device& device) {
  return 2 * shape.values() * size_of(type) > device.l2_bytes;
}

std::optional<Tiling> on_chip_tiling_of(Type type, const Shape& any_shape, int vector, const Device& device, int kept) {
  const Shape shape = with_planes(any_shape);
  const int most_in_cluster = device.capability >= kFirstWithClusters ? kMostInCluster : 1;
  std::optional<OnChipChoice> best;
  const Tiling all = untiled(shape, vector);
  for (int cluster = 1; cluster <= most_in_cluster; cluster *= 2) {
    for (int width = widest_on_chip(all); width >= narrowest_on_chip(type, all); width /= 2) {
      // Fewer threads divide the positions more evenly among the blocks.
      for (const int threads : {kOnChipThreads, kOnChipThreads / 2, kOnChipThreads / 4}) {
        const OnChipChoice choice(on_chip_tiling(shape, vector, width, cluster, threads), cluster, type, device, kept);
        if (choice.fits && (!best || choice.is_better_than(*best))) {
          best = choice;
        }
      }
    }
  }
  if (!best) {
    return std::nullopt;
  }
  return best->tiling;
}

OnChipMemory on_chip_memory_of(Type type, const Tiling& tiling, int kept) {
  constexpr int64_t kDouble = sizeof(double);
  const int64_t channels = tiling.channels_per_tile;
  OnChipMemory memory = {};
  memory.sums = sums_bytes(tiling);
  memory.moments = memory.sums + 2 * kDouble * channels;
  memory.coefficients = memory.moments + 3 * kDouble * channels;
  memory.values = quotient_up(memory.coefficients + 3 * kDouble * channels, kVectorBytes) * kVectorBytes;
  const int64_t vectors = quotient_up(tiling.positions_per_slice, tiling.height) * tiling.threads();
  memory.values_bytes = vectors * tiling.vector * size_of(type);
  memory.bytes = memory.values + kept * memory.values_bytes;
  return memory;
}

int64_t sums_bytes(const Tiling& tiling) {
  constexpr int64_t kSums = 2 * sizeof(double);
  return std::max<int64_t>(1, quotient_up(tiling.height, 2)) * tiling.channels_per_tile * kSums;
}

WorkspaceLayout workspace_of(Type type, const Tiling& tiling) {
  const auto channels = static_cast<size_t>(tiling.channels);
  const size_t partials = tiling.slices == 1 ? 0 : static_cast<size_t>(tiling.slices) * channels * 2 * sizeof(double);
  return {partials, kGradientNumbers * channels * (type == Type::kDouble ? sizeof(double) : sizeof(float))};
}

size_t forward_workspace_bytes(Type type, const Shape& shape, const Device& device) {
  size_t most = 0;
  // Whatever the addresses will be.
  for (int vector = vector_of(type, shape, {}); vector > 0; vector /= 2) {
    const auto layout = workspace_of(type, tiling_of(shape, vector, device));
    most = std::max(most, layout.partials_bytes + layout.coefficients_bytes);
  }
  return most;
}

size_t backward_workspace_bytes(Type type, const Shape& shape, const Device& device) {
  return forward_workspace_bytes(type, shape, device);
}

}  // namespace momentum_bn::kernels::cuda
