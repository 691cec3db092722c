#pragma once

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.h"

namespace momentum_bn::kernels::cuda {

/// forward() in one launch.
/// @param tiling  on_chip_tiling_of() the arguments, for kKeptForward
int forward_on_chip(const ForwardArgs& args, const Tiling& tiling);

/// backward() through the statistics in one launch.
/// @param tiling  on_chip_tiling_of() the arguments, for kKeptBackward
int backward_on_chip(const BackwardArgs& args, const Tiling& tiling);

}  // namespace momentum_bn::kernels::cuda
