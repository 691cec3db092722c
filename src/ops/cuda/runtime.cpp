#include "ops/cuda/runtime.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

namespace momentum_bn::cuda {

void check(int status, const char* call) {
  if (status == cudaSuccess) {
    return;
  }
  const auto error = static_cast<cudaError_t>(status);
  (void)cudaGetLastError();  // told here, it is not the next call's
  TORCH_CHECK(false, "momentum_bn: ", call, " failed: ", cudaGetErrorName(error), ", ", cudaGetErrorString(error));
}

void use_device(c10::Device device) {
  // Both runtimes follow the driver's current context; only a thread that has none yet keeps them apart.
  int current = -1;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current != device.index()) {
    check(cudaSetDevice(device.index()), "cudaSetDevice");
  }
}

kernels::cuda::Stream current_stream(c10::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

}  // namespace momentum_bn::cuda
