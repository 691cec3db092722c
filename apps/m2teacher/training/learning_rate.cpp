#include "training/learning_rate.h"

#include <cmath>
#include <numbers>

namespace m2teacher {

double learning_rate(int64_t step, int64_t total_steps, int64_t warmup_steps, double peak) {
  if (step < warmup_steps) {
    return peak * static_cast<double>(step + 1) / static_cast<double>(warmup_steps);
  }
  const double done = static_cast<double>(step - warmup_steps) / static_cast<double>(total_steps - warmup_steps);
  return peak * 0.5 * (1 + std::cos(std::numbers::pi * done));
}

}  // namespace m2teacher
