#include "ops/cpu/huge_pages.h"

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace momentum_bn::cpu {
namespace {

constexpr uintptr_t kHugePage = 2 * 1024 * 1024;
/// glibc maps allocations from at most this size on afresh, whatever its dynamic threshold has grown to.
constexpr size_t kAlwaysFresh = 32 * 1024 * 1024;

}  // namespace

void advise_huge_pages(const at::Tensor& fresh) {
#ifdef __linux__
  if (fresh.nbytes() < kAlwaysFresh) return;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + fresh.nbytes()) / kHugePage * kHugePage;
  // Advice only: where it fails, memory comes in small pages as before.
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)fresh;
#endif
}

}  // namespace momentum_bn::cpu
