#pragma once

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace m2teacher {

/// Steps allocate the same sizes again and again: memory that goes back to the system between them comes back page by
/// page.
inline void keep_freed_memory() {
#ifdef __GLIBC__
  constexpr int kKept = 1 << 28;
  mallopt(M_MMAP_THRESHOLD, kKept);
  mallopt(M_TRIM_THRESHOLD, kKept);
#endif
}

}  // namespace m2teacher
