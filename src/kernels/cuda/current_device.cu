#include "kernels/cuda/kernels.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>

namespace momentum_bn::kernels::cuda {
inline namespace current_device_kernels {

/// A kernel that is only asked what it was compiled for.
__global__ void nothing_kernel() {}

int ask(int device, cudaDeviceAttr attribute, int64_t& value) {
  int answer = 0;
  const int error = cudaDeviceGetAttribute(&answer, attribute, device);
  value = answer;
  return error;
}

int ask_all(int index, Device& device) {
  int64_t multiprocessors = 0;
  int64_t major = 0;
  int64_t minor = 0;
  int64_t threads = 0;
  int error = ask(index, cudaDevAttrMultiProcessorCount, multiprocessors);
  if (error == 0) {
    error = ask(index, cudaDevAttrComputeCapabilityMajor, major);
  }
  if (error == 0) {
    error = ask(index, cudaDevAttrComputeCapabilityMinor, minor);
  }
  if (error == 0) {
    error = ask(index, cudaDevAttrMaxThreadsPerMultiProcessor, threads);
  }
  if (error == 0) {
    error = ask(index, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.shared_memory_per_block);
  }
  if (error == 0) {
    error = ask(index, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device.shared_memory_per_multiprocessor);
  }
  if (error == 0) {
    error = ask(index, cudaDevAttrL2CacheSize, device.l2_bytes);
  }
  cudaFuncAttributes compiled = {};
  if (error == 0) {
    error = cudaFuncGetAttributes(&compiled, nothing_kernel);
  }
  device.multiprocessors = static_cast<int>(multiprocessors);
  device.capability = std::min(static_cast<int>(10 * major + minor), compiled.ptxVersion);
  device.threads_per_multiprocessor = static_cast<int>(threads);
  return error;
}

}  // namespace current_device_kernels

int current_device(Device& device) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  int index = 0;
  if (const int error = cudaGetDevice(&index)) {
    return error;
  }
  const std::lock_guard lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) {
    device = found->second;
    return 0;
  }
  const int error = ask_all(index, device);
  if (error == 0) {
    known[index] = device;
  }
  return error;
}

}  // namespace momentum_bn::kernels::cuda
