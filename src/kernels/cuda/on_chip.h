#pragma once

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.h"

namespace momentum_bn::kernels::cuda {

/// forward() in one launch.
/// @param tiling  on_chip_tiling_of() the arguments
int forward_on_chip(const ForwardArgs& args, const Tiling& tiling);

}  // namespace momentum_bn::kernels::cuda
