#include "cli/cli.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace {

/// Steps allocate the same sizes again and again: memory that goes back to the system between them comes back page by
/// page.
void keep_freed_memory() {
#ifdef __GLIBC__
  constexpr int kKept = 1 << 28;
  mallopt(M_MMAP_THRESHOLD, kKept);
  mallopt(M_TRIM_THRESHOLD, kKept);
#endif
}

}  // namespace

int main(int argc, char** argv) {
  keep_freed_memory();
  return m2teacher::run(argc, argv);
}
