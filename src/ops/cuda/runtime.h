#pragma once

#include <c10/core/Device.h>
#include <cuda_runtime_api.h>

namespace momentum_bn::cuda {

/// @param status  a cudaError_t
/// @throws c10::Error that names the call and what the runtime says, unless it succeeded
void check(int status, const char* call);

/// Makes `device`, torch's current one, that of the CUDA runtime inside this library, which is not torch's copy of it.
void use_device(c10::Device device);

}  // namespace momentum_bn::cuda
