#pragma once

#include "kernels/cuda/kernels.h"

#include <c10/core/Device.h>

// torch's CUDA runtime and the one inside this library, seen from one another.

namespace momentum_bn::cuda {

/// @param status  a cudaError_t
/// @throws c10::Error that names the call and what the runtime says, unless it succeeded
void check(int status, const char* call);

/// Makes `device`, torch's current one, that of the CUDA runtime inside this library, which is not torch's copy of it.
void use_device(c10::Device device);

/// torch's current stream of `device`. Asked for through c10 alone: nothing of torch's CUDA libraries is linked.
kernels::cuda::Stream current_stream(c10::Device device);

}  // namespace momentum_bn::cuda
