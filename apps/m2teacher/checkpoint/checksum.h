#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace m2teacher {

/// XXH3 of 128 bits (xxHash) over bytes that come in pieces.
class Checksum {
 public:
  static constexpr size_t kDigits = 32;

  Checksum();
  ~Checksum();
  Checksum(const Checksum&) = delete;
  Checksum& operator=(const Checksum&) = delete;

  void update(const void* data, size_t size);
  /// Of everything so far: `kDigits` lower-case hexadecimal digits, the most significant first.
  std::string digits() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace m2teacher
