#pragma once

#include <cstdint>

namespace m2teacher {

/// Rises linearly to `peak` over the first `warmup_steps` steps, then falls to 0 by a half cosine at `total_steps`.
/// @param step  0 for the first
double learning_rate(int64_t step, int64_t total_steps, int64_t warmup_steps, double peak);

}  // namespace m2teacher
