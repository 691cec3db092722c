#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// Values that may be read and written beyond the end of an array, as full vectors.
constexpr int64_t kPadding = 64;

/// Memory of at most kBytes that each thread keeps for its short-lived arrays until it ends, so that a call need not
/// ask the system for it.
class ScratchStack {
 public:
  static constexpr size_t kBytes = size_t{512} * 1024;
  static constexpr std::align_val_t kAlignment{64};

  /// Returns null where there is not enough left.
  std::byte* push(size_t bytes) {
    if (used_ + bytes > kBytes) {
      return nullptr;
    }
    if (!memory_) {
      memory_.reset(static_cast<std::byte*>(::operator new(kBytes, kAlignment)));
    }
    std::byte* top = memory_.get() + used_;
    used_ += bytes;
    return top;
  }
  void pop(size_t bytes) { used_ -= bytes; }

  static ScratchStack& of_this_thread() {
    static thread_local ScratchStack stack;
    return stack;
  }

 private:
  struct Delete {
    void operator()(std::byte* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<std::byte, Delete> memory_;
  size_t used_ = 0;
};

/// Where an array begins within a page of 4 KB: `eighth` eighths of it after `values`, in whole cache lines. A read
/// waits for an earlier write to an address with the same last 12 bits; arrays that are walked through together with
/// the values are kept some eighths of a page apart from them and from each other.
struct Apart {
  const void* values;
  int eighth;

  size_t offset_in_page() const {
    return (reinterpret_cast<uintptr_t>(values) + static_cast<size_t>(eighth) * kPage / 8) % kPage / 64 * 64;
  }

  static constexpr size_t kPage = 4096;
};

/// Uninitialised memory whose tail may be read and written as full vectors. A thread must free what it takes, the last
/// first.
template <typename V>
class Scratch {
 public:
  explicit Scratch(int64_t size) : Scratch(Bytes{bytes_of(size)}) {}
  Scratch(int64_t size, const Apart& apart) : Scratch(Bytes{bytes_of(size) + Apart::kPage}) {
    const size_t offset = reinterpret_cast<uintptr_t>(values_) % Apart::kPage;
    // NOLINTNEXTLINE(bugprone-sizeof-expression): bytes are divided into values
    values_ += (apart.offset_in_page() + Apart::kPage - offset) % Apart::kPage / sizeof(V);
  }
  ~Scratch() {
    if (on_stack_) {
      ScratchStack::of_this_thread().pop(bytes_);
    } else {
      ::operator delete(memory_, ScratchStack::kAlignment);
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  V* get() const { return values_; }
  void clear(int64_t size) const { std::fill_n(values_, size, V(0)); }

 private:
  struct Bytes {
    size_t count;
  };
  explicit Scratch(Bytes bytes)
      : bytes_(bytes.count),
        on_stack_(ScratchStack::of_this_thread().push(bytes_)),
        memory_(on_stack_ ? on_stack_ : ::operator new(bytes_, ScratchStack::kAlignment)),
        values_(static_cast<V*>(memory_)) {}

  static size_t bytes_of(int64_t size) { return (static_cast<size_t>(size + kPadding) * sizeof(V) + 63) / 64 * 64; }

  size_t bytes_;
  void* on_stack_;
  void* memory_;
  V* values_;
};

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
