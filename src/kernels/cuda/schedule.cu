// The schedule alone.

#include "kernels/cuda/blend.h"
#include "kernels/cuda/start.h"

namespace momentum_bn::kernels::cuda {
inline namespace schedule_kernels {

struct ScheduleParameters {
  int64_t* cur_iter;
  StoredMomentum momentum;
  int64_t total_iters;
  bool cosine;
};

__global__ void schedule_kernel(const ScheduleParameters p) { p.momentum.advance(p.cur_iter, p.total_iters, p.cosine); }

}  // namespace schedule_kernels

int advance_schedule(int64_t* cur_iter, void* momentum, bool momentum_is_float, int64_t total_iters, bool cosine,
                     Stream stream) {
  const ScheduleParameters p = {cur_iter, {momentum, momentum_is_float}, total_iters, cosine};
  return start(schedule_kernel, Grid{1, 1, 1, 0}, stream, p);
}

}  // namespace momentum_bn::kernels::cuda
