#include "ops/cuda/driver.h"
#include "ops/cuda/runtime.h"

#include "kernels/cuda/devices.h"

#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>

int emulated_stream_is_capturing = 0;
int emulated_allocations = 0;

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulated_stream_is_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* number) {
  *number = reinterpret_cast<unsigned long long>(stream);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  ++emulated_allocations;
  *memory = std::malloc(bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

int momentum_bn::cuda::driver_version() { return 0; }
int momentum_bn::cuda::runtime_version() { return 0; }
bool momentum_bn::cuda::driver_suits() { return true; }

/// Small, so that a few values are already shared out among blocks. The variable says how much it keeps on the chip.
int momentum_bn::kernels::cuda::current_device(Device& device) {
  const char* const shared_kib = std::getenv("EMULATED_SHARED_KIB");
  device = test::small_device(90, shared_kib ? std::atoi(shared_kib) : 28);
  return cudaSuccess;
}

namespace momentum_bn::cuda {

void check(int status, const char* call) { TORCH_CHECK(status == 0, call, " failed: ", status); }

void use_device(c10::Device) {}

kernels::cuda::Stream current_stream(c10::Device) { return nullptr; }

}  // namespace momentum_bn::cuda
