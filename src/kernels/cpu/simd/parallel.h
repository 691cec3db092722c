#pragma once

#include "kernels/cpu/kernels.h"

#include <type_traits>

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// Below this many values a second thread costs more than it brings.
constexpr int64_t kSerialBelow = int64_t{16} * 1024;

/// Calls run(begin, end) over parts of [0, tasks), which together touch `values` values.
template <typename Run>
void parallel(ParallelFor parallel_for, int64_t tasks, int64_t values, const Run& run) {
  if (tasks == 0) {
    return;
  }
  if (tasks == 1 || values < kSerialBelow) {
    return run(int64_t{0}, tasks);
  }
  parallel_for(
      tasks, [](void* context, int64_t begin, int64_t end) { (*static_cast<const Run*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&run)));
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Calls run(std::true_type or std::false_type) with the flag as a type.
template <typename Run>
void with_flag(bool flag, const Run& run) {
  flag ? run(std::true_type()) : run(std::false_type());
}

/// Does the same with two flags.
template <typename Run>
void with_flags(bool first, bool second, const Run& run) {
  if (first) {
    second ? run(std::true_type(), std::true_type()) : run(std::true_type(), std::false_type());
  } else {
    second ? run(std::false_type(), std::true_type()) : run(std::false_type(), std::false_type());
  }
}

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
