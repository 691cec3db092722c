#include "kernels/cuda/limits.h"

#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <utility>

namespace momentum_bn::kernels::cuda {

int allow_all_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> allowed;
  int device = 0;
  if (const int error = cudaGetDevice(&device)) {
    return error;
  }
  const std::lock_guard lock(mutex);
  if (allowed.count({device, kernel}) > 0) {
    return 0;
  }
  int most = 0;
  if (const int error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) {
    return error;
  }
  // The limit is not what this launch needs, as another thread's launch may need more.
  if (const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)) {
    return error;
  }
  allowed.insert({device, kernel});
  return 0;
}

int can_run_clusters(const void* kernel, const cudaLaunchConfig_t& config, bool& can) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, unsigned, unsigned, size_t>, bool> known;
  int device = 0;
  if (const int error = cudaGetDevice(&device)) {
    return error;
  }
  const unsigned blocks = config.attrs[0].val.clusterDim.y;
  const auto key = std::make_tuple(device, kernel, blocks, config.blockDim.x, config.dynamicSmemBytes);
  const std::lock_guard lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) {
    can = found->second;
    return 0;
  }
  int clusters = 0;
  if (const int error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)) {
    return error;
  }
  can = known[key] = clusters > 0;
  return 0;
}

}  // namespace momentum_bn::kernels::cuda
