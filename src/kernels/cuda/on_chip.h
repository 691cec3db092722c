#pragma once

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.h"

#include <functional>

namespace momentum_bn::kernels::cuda {

/// Goes one of both ways, as use_paths() allows.
/// @param on_chip  launches once, or returns kNoCluster; empty: the values do not fit on chip
/// @param several  launches otherwise
/// @return 0, or a cudaError_t
int go(const std::function<int()>& on_chip, const std::function<int()>& several);

/// forward() in one launch.
/// @param tiling  on_chip_tiling_of() the arguments, for kKeptForward
/// @return as start()
int forward_on_chip(const ForwardArgs& args, const Tiling& tiling);

/// backward() through the statistics in one launch.
/// @param tiling  on_chip_tiling_of() the arguments, for kKeptBackward
/// @return as start()
int backward_on_chip(const BackwardArgs& args, const Tiling& tiling);

}  // namespace momentum_bn::kernels::cuda
