#include <momentum_bn/schedule.h>

#include "ops/checks.h"

#include <algorithm>
#include <cmath>

namespace momentum_bn {

double scheduled_momentum(int64_t cur_iter, int64_t total_iters) {
  check_total_iters(total_iters);
  const double progress = static_cast<double>(std::min(cur_iter, total_iters)) / static_cast<double>(total_iters);
  return (std::cos(M_PI * progress) + 1) * 0.5;
}

double teacher_param_momentum(int64_t updates, int64_t total_iters, double start) {
  check_param_momentum(start);
  return 1 - (1 - start) * scheduled_momentum(updates, total_iters);
}

}  // namespace momentum_bn
