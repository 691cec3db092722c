#include "ops/cpu/kept_memory.h"

#include "ops/shared/kernel_tensors.h"

#include <c10/core/Allocator.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/impl/alloc_cpu.h>
#include <momentum_bn/memory.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace momentum_bn {
namespace cpu {
namespace {

/// From this size on glibc maps an allocation afresh, whatever its dynamic threshold has grown to.
constexpr size_t kAlwaysFresh = size_t{32} * 1024 * 1024;
constexpr int64_t kDefaultLimit = int64_t{1} << 30;

/// Asks for huge pages, where the system leaves these to the program (Linux, transparent_hugepage=madvise). It is
/// advice only: where it fails, memory comes in small pages as before.
void advise_huge_pages(void* memory, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = uintptr_t{2} * 1024 * 1024;
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) {
    (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#else
  (void)memory;
  (void)bytes;
#endif
}

struct Block {
  void* memory;
  size_t bytes;
};

/// Keeps freed blocks; the oldest is given up first. Neither freeing nor taking a block waits for the lock, which a
/// forked process may have inherited in the locked state: both can do without.
class KeptMemory : public c10::Allocator {
 public:
  /// Never destroyed: tensors may be freed later than any static object.
  static KeptMemory& instance() {
    static auto* memory = new KeptMemory;
    return *memory;
  }

  c10::DataPtr allocate(size_t bytes) override { return allocate_telling(bytes).first; }

  /// @return the memory, and whether it was in use before
  std::pair<c10::DataPtr, bool> allocate_telling(size_t bytes) {
    Block block = take(bytes);
    const bool used_before = block.memory != nullptr;
    if (!used_before) {
      block = {c10::alloc_cpu(bytes), bytes};
      if (bytes >= kAlwaysFresh) {
        advise_huge_pages(block.memory, bytes);
      }
    }
    auto* context = new Block(block);
    return {c10::DataPtr(block.memory, context, &free_or_keep, c10::Device(c10::kCPU)), used_before};
  }

  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }

  int64_t kept() const {
    const std::lock_guard lock(mutex_);
    return kept_;
  }
  int64_t limit() const {
    const std::lock_guard lock(mutex_);
    return limit_;
  }
  void set_limit(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    limit_ = bytes;
    shrink_to(limit_);
  }
  void release() {
    const std::lock_guard lock(mutex_);
    shrink_to(0);
  }

 private:
  /// A kept block that fits and is not much too large, or none.
  Block take(size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || bytes < kAlwaysFresh) {
      return {nullptr, 0};
    }
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      if (block->bytes < bytes || block->bytes - bytes > block->bytes / 4) {
        continue;
      }
      const Block taken = *block;
      kept_ -= static_cast<int64_t>(taken.bytes);
      blocks_.erase(block);
      return taken;
    }
    return {nullptr, 0};
  }

  static void free_or_keep(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    if (!instance().keep(*block)) {
      c10::free_cpu(block->memory);
    }
  }

  bool keep(const Block& block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || block.bytes < kAlwaysFresh || static_cast<int64_t>(block.bytes) > limit_) {
      return false;
    }
    shrink_to(limit_ - static_cast<int64_t>(block.bytes));
    blocks_.push_back(block);
    kept_ += static_cast<int64_t>(block.bytes);
    return true;
  }

  void shrink_to(int64_t bytes) {
    while (kept_ > bytes) {
      const Block oldest = blocks_.front();
      blocks_.pop_front();
      kept_ -= static_cast<int64_t>(oldest.bytes);
      c10::free_cpu(oldest.memory);
    }
  }

  mutable std::mutex mutex_;
  std::deque<Block> blocks_;
  int64_t kept_ = 0;
  int64_t limit_ = kDefaultLimit;
};

}  // namespace

FreshOutput fresh_output(const at::Tensor& x) {
  if (x.nbytes() < kAlwaysFresh) {
    return {empty_output(x), false};
  }
  auto& kept = KeptMemory::instance();
  auto [memory, used_before] = kept.allocate_telling(x.nbytes());
  auto storage = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), x.nbytes(),
                                                       std::move(memory), &kept, /*resizable=*/true);
  auto y = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                    x.dtype());
  y.unsafeGetTensorImpl()->set_sizes_contiguous(x.sizes());
  y.unsafeGetTensorImpl()->empty_tensor_restride(x.suggest_memory_format());
  return {y, used_before};
}

}  // namespace cpu

int64_t kept_memory() { return cpu::KeptMemory::instance().kept(); }

int64_t kept_memory_limit() { return cpu::KeptMemory::instance().limit(); }

void set_kept_memory_limit(int64_t bytes) {
  TORCH_CHECK_VALUE(bytes >= 0, "the limit of kept memory must be at least 0 bytes (got ", bytes, ")");
  cpu::KeptMemory::instance().set_limit(bytes);
}

void release_kept_memory() { cpu::KeptMemory::instance().release(); }

}  // namespace momentum_bn
