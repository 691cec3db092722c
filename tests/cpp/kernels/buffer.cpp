#include "buffer.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>
#include <new>

namespace momentum_bn::kernels::test {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr size_t kGuardBefore = 64;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kGuardBehind = 0;
#else
constexpr size_t kGuardBehind = 256;
#endif
constexpr unsigned char kGuard = 0xA5;
constexpr unsigned char kNaNByte = 0xFF;  // in every type

template <typename Run>
auto with_type(Type type, const Run& run) {
  switch (type) {
    case Type::kFloat:
      return run(float());
    case Type::kDouble:
      return run(double());
    case Type::kBFloat16:
      return run(c10::BFloat16());
    default:
      return run(c10::Half());
  }
}

template <typename T>
double load(const unsigned char* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return static_cast<double>(value);
}

template <typename T>
void store(unsigned char* to, double value) {
  T rounded;
  if constexpr (sizeof(T) == 2) {
    rounded = T(static_cast<float>(value));
  } else {
    rounded = static_cast<T>(value);
  }
  std::memcpy(to, &rounded, sizeof(T));
}

}  // namespace

std::string name_of(Type type) {
  switch (type) {
    case Type::kFloat:
      return "float";
    case Type::kDouble:
      return "double";
    case Type::kBFloat16:
      return "bfloat16";
    default:
      return "half";
  }
}

size_t size_of(Type type) {
  return with_type(type, [](auto value) { return sizeof(value); });
}

Type accumulate_type(Type type) { return type == Type::kDouble ? Type::kDouble : Type::kFloat; }

void Buffer::Free::operator()(unsigned char* memory) const { ::operator delete[](memory, kAlignment); }

Buffer::Buffer(Type type, int64_t size, int64_t offset)
    : type_(type),
      size_(size),
      begin_(kGuardBefore + static_cast<size_t>(offset) * size_of(type)),
      end_(begin_ + static_cast<size_t>(size) * size_of(type)),
      capacity_(end_ + kGuardBehind),
      memory_(static_cast<unsigned char*>(::operator new[](capacity_, kAlignment))) {
  std::memset(memory_.get(), kGuard, capacity_);
  std::memset(memory_.get() + begin_, kNaNByte, end_ - begin_);
}

Buffer::Buffer(Type type, const std::vector<double>& values, int64_t offset)
    : Buffer(type, static_cast<int64_t>(values.size()), offset) {
  with_type(type, [&](auto example) {
    unsigned char* to = memory_.get() + begin_;
    for (const double value : values) {
      store<decltype(example)>(to, value);
      to += sizeof(example);
    }
  });
}

void Buffer::set(int64_t index, double value) {
  unsigned char* to = memory_.get() + begin_ + static_cast<size_t>(index) * size_of(type_);
  with_type(type_, [&](auto example) { store<decltype(example)>(to, value); });
}

double Buffer::get(int64_t index) const {
  const unsigned char* from = memory_.get() + begin_ + static_cast<size_t>(index) * size_of(type_);
  return with_type(type_, [&](auto example) { return load<decltype(example)>(from); });
}

std::vector<double> Buffer::values() const {
  std::vector<double> result(static_cast<size_t>(size_));
  with_type(type_, [&](auto example) {
    const unsigned char* from = memory_.get() + begin_;
    for (double& value : result) {
      value = load<decltype(example)>(from);
      from += sizeof(example);
    }
  });
  return result;
}

uint64_t Buffer::checksum() const {
  uint64_t sum = 0;
  size_t at = begin_;
  for (; at + sizeof(uint64_t) <= end_; at += sizeof(uint64_t)) {
    uint64_t word;
    std::memcpy(&word, memory_.get() + at, sizeof(word));
    sum = (sum ^ word) * 0x9E3779B97F4A7C15;
    sum ^= sum >> 29;
  }
  for (; at < end_; ++at) {
    sum = (sum ^ memory_[at]) * 0x9E3779B97F4A7C15;
  }
  return sum;
}

bool Buffer::guards_are_intact() const {
  const auto is_guard = [](unsigned char byte) { return byte == kGuard; };
  return std::all_of(memory_.get(), memory_.get() + begin_, is_guard) &&
         std::all_of(memory_.get() + end_, memory_.get() + capacity_, is_guard);
}

std::vector<double> rounded(Type type, const std::vector<double>& values) { return Buffer(type, values).values(); }

}  // namespace momentum_bn::kernels::test
