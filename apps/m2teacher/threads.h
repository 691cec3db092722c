#pragma once

#include <ATen/Parallel.h>

namespace m2teacher {

/// How many threads torch's operations use that this thread calls. torch keeps that number for each thread, but a
/// thread that has not yet asked for its own takes the one that was set last anywhere: so it asks first.
inline void set_threads_of_this_thread(int count) {
  at::get_num_threads();
  at::set_num_threads(count);
}

}  // namespace m2teacher
