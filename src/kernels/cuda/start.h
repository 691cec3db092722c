#pragma once

#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/limits.h"

// This file leads from run-time types and sizes to an instance of a kernel, and launches it.

namespace momentum_bn::kernels::cuda {

/// What a kernel may use of a block's shared memory without being given leave.
constexpr int64_t kSharedBytesUnasked = 48 * 1024;

struct Grid {
  int64_t x;
  int64_t y;
  int threads;
  int64_t shared_bytes;
  /// Blocks along y that run together and can read each other's shared memory.
  int cluster = 1;

  static Grid of(const Tiling& tiling) { return {tiling.tiles, tiling.slices, tiling.threads(), sums_bytes(tiling)}; }
};

/// No cudaError_t: the device cannot run such a cluster, and nothing was launched.
constexpr int kNoCluster = -1;

/// Returns 0, a cudaError_t, or for a cluster kNoCluster.
template <typename Parameters>
int start(void (*kernel)(Parameters), const Grid& grid, Stream stream, const Parameters& parameters) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
  if (grid.cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = 1;
    attribute.val.clusterDim.y = static_cast<unsigned>(grid.cluster);
    attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  const void* const address = reinterpret_cast<const void*>(kernel);
  if (grid.shared_bytes > kSharedBytesUnasked) {
    if (const int error = allow_all_shared_memory(address)) {
      return error;
    }
  }
  if (grid.cluster > 1) {
    bool can = false;
    if (const int error = can_run_clusters(address, config, can)) {
      return error;
    }
    if (!can) {
      return kNoCluster;
    }
  }
  return cudaLaunchKernelEx(&config, kernel, parameters);
}

/// run.operator()<T>() with the type of the values.
template <typename Run>
int with_type(Type type, const Run& run) {
  switch (type) {
    case Type::kFloat:
      return run.template operator()<float>();
    case Type::kDouble:
      return run.template operator()<double>();
    case Type::kBFloat16:
      return run.template operator()<__nv_bfloat16>();
    default:
      return run.template operator()<__half>();
  }
}

template <typename T, int V, typename Run>
int with_layout(const Tiling& tiling, const Run& run) {
  return tiling.rows ? run.template operator()<T, V, true>() : run.template operator()<T, V, false>();
}

/// run.operator()<T, V, kRows>()
/// @tparam kMostInRows  no vectors of rows are wider
template <int kMostInRows = 16, typename Run>
int with_tiling(Type type, const Tiling& tiling, const Run& run) {
  return with_type(type, [&]<typename T>() {
    constexpr int kMost = 16 / static_cast<int>(sizeof(T));
    if constexpr (kMost > kMostInRows) {
      if (tiling.vector == kMost) {
        return run.template operator()<T, kMost, false>();
      }
    } else {
      if (tiling.vector == kMost) {
        return with_layout<T, kMost>(tiling, run);
      }
    }
    if constexpr (sizeof(T) == 2) {
      if (tiling.vector == kMost / 2) {
        return with_layout<T, kMost / 2>(tiling, run);
      }
    }
    return with_layout<T, 1>(tiling, run);
  });
}

/// Does the same for tilings of backward_vector_of().
template <typename Run>
int with_backward_tiling(Type type, const Tiling& tiling, const Run& run) {
  return with_tiling<kMostInRowsBackward>(type, tiling, run);
}

}  // namespace momentum_bn::kernels::cuda
