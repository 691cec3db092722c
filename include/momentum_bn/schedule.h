#pragma once

#include <momentum_bn/export.h>

#include <cstdint>

namespace momentum_bn {

/// Weight of the batch after `cur_iter` updates: (cos(pi * min(cur_iter, total_iters) / total_iters) + 1) / 2
/// (arXiv 2101.07525). @throws c10::ValueError where total_iters < 1
MOMENTUM_BN_API double scheduled_momentum(int64_t cur_iter, int64_t total_iters);

/// Weight of the teacher's own parameters in update number `updates` (the first is 0):
/// 1 - (1 - start) * (cos(pi * min(updates, total_iters) / total_iters) + 1) / 2  (arXiv 2101.07525).
/// @throws c10::ValueError where total_iters < 1 or start is outside [0, 1]
MOMENTUM_BN_API double teacher_param_momentum(int64_t updates, int64_t total_iters, double start);

}  // namespace momentum_bn
