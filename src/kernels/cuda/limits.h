#pragma once

#include <cuda_runtime.h>

// What the current device lets a kernel have: asked for once for each and remembered.

namespace momentum_bn::kernels::cuda {

/// Gives the kernel leave to use as much shared memory as a block can have. Returns a cudaError_t.
int allow_all_shared_memory(const void* kernel);

/// Whether the device can run a cluster of such a launch: a part of a device (MIG) may have too few multiprocessors
/// side by side. Returns a cudaError_t.
int can_run_clusters(const void* kernel, const cudaLaunchConfig_t& config, bool& can);

}  // namespace momentum_bn::kernels::cuda
