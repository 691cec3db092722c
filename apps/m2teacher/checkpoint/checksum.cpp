#include "checkpoint/checksum.h"

// The library's code itself: nothing to link.
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cstdint>

namespace m2teacher {

struct Checksum::State {
  XXH3_state_t hash;
};

Checksum::Checksum() : state_(std::make_unique<State>()) { XXH3_128bits_reset(&state_->hash); }

Checksum::~Checksum() = default;

void Checksum::update(const void* data, size_t size) { XXH3_128bits_update(&state_->hash, data, size); }

std::string Checksum::digits() const {
  constexpr const char* kHexadecimal = "0123456789abcdef";
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(&state_->hash));
  std::string text;
  text.reserve(kDigits);
  for (const uint8_t byte : canonical.digest) {
    text += kHexadecimal[byte >> 4];
    text += kHexadecimal[byte & 15];
  }
  return text;
}

}  // namespace m2teacher
