#include <momentum_bn/schedule.h>

#include "kernels/channel_rules.h"
#include "ops/normalise/options.h"
#include "ops/teacher/update.h"

namespace momentum_bn {

double scheduled_momentum(int64_t cur_iter, int64_t total_iters) {
  check_total_iters(total_iters);
  return kernels::cosine_momentum(cur_iter, total_iters);
}

double teacher_param_momentum(int64_t updates, int64_t total_iters, double start) {
  check_param_momentum(start);
  return 1 - (1 - start) * scheduled_momentum(updates, total_iters);
}

}  // namespace momentum_bn
