#pragma once

#include "kernels/cpu/kernels.h"

namespace momentum_bn::cpu {

/// Runs body(context, begin, end) over parts of [0, tasks) on torch's threads. A kernels::ParallelFor.
void parallel_for(int64_t tasks, kernels::Body body, void* context);

/// How parallel_for gets its threads, in words.
const char* threads_come_from();

}  // namespace momentum_bn::cpu
