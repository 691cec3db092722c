#pragma once

#include "kernels/cuda/kernels.h"

#include <string>
#include <vector>

namespace momentum_bn::kernels::cuda::test {

struct NamedDevice {
  std::string name;
  Device device;
};

/// As NVIDIA's data sheets and tuning guides have them.
const std::vector<NamedDevice>& real_devices();

/// Few multiprocessors with little shared memory per block: small tensors are split among many blocks.
Device small_device(int capability, int64_t shared_kib);

}  // namespace momentum_bn::kernels::cuda::test
