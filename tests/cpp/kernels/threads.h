#pragma once

#include "kernels/cpu/kernels.h"

#include <string>
#include <vector>

namespace momentum_bn::kernels::test {

struct Schedule {
  std::string name;
  ParallelFor parallel_for;
};

/// All tasks in one call, here.
void serial(int64_t tasks, Body body, void* context);

/// Every way in which the tests spread tasks: over two, three and four threads, and one task per call, the last first.
const std::vector<Schedule>& schedules();

}  // namespace momentum_bn::kernels::test
