#pragma once

#include "kernels/cpu/kernels.h"

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

namespace momentum_bn::kernels::test {

std::string name_of(Type type);
size_t size_of(Type type);
/// What the kernels compute values of `type` in, and keep coefficients in.
Type accumulate_type(Type type);

/// Values as a kernel gets them. Around them lie guard bytes that show writes beyond the ends; under AddressSanitizer
/// there are none behind the last value, so that it sees reads as well.
class Buffer {
 public:
  /// `size` values of NaN, the first `offset` values behind an aligned address.
  Buffer(Type type, int64_t size, int64_t offset = 0);
  /// The values rounded to `type`.
  Buffer(Type type, const std::vector<double>& values, int64_t offset = 0);

  void* data() { return memory_.get() + begin_; }
  const void* data() const { return memory_.get() + begin_; }
  void set(int64_t index, double value);
  double get(int64_t index) const;
  std::vector<double> values() const;
  /// Of the values' bytes: differs, in all likelihood, where they do.
  uint64_t checksum() const;
  bool guards_are_intact() const;

 private:
  struct Free {
    void operator()(unsigned char* memory) const;
  };

  Type type_;
  int64_t size_;
  size_t begin_;
  size_t end_;
  size_t capacity_;
  std::unique_ptr<unsigned char[], Free> memory_;
};

/// `values` rounded to `type` and back.
std::vector<double> rounded(Type type, const std::vector<double>& values);

}  // namespace momentum_bn::kernels::test
