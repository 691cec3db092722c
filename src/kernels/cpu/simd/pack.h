#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

// This file is included by sources that are compiled once per instruction set. Everything lies in a namespace of that
// instruction set, so that no inline function compiled for one can stand in for another's.

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// Marks what loops over values call: they are fast only where it is part of them, and compilers inline less the larger
/// a source is.
#define MOMENTUM_BN_INLINE [[gnu::always_inline]] inline

/// The type in which values of type T are computed.
template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// The largest value that rounding to T turns into 0.
template <typename T>
constexpr Accumulate<T> kStoredAsZero = 0;
template <>
inline constexpr float kStoredAsZero<c10::BFloat16> = 0x1p-134F;
template <>
inline constexpr float kStoredAsZero<c10::Half> = 0x1p-25F;

/// A register's worth of bits, with integer arithmetic on its 32-bit lanes (a vector type of GCC and Clang).
using Bits [[gnu::vector_size(sizeof(at::vec::Vectorized<float>))]] = uint32_t;

/// Whether the processor has 32 vector registers for sure; else it may have 16.
#if defined(CPU_CAPABILITY_AVX512)
constexpr bool kHas32Registers = true;
#else
constexpr bool kHas32Registers = false;
#endif

/// Writes past the caches, which keep what they hold; `to` must be aligned to sizeof(Bits). Other threads see the
/// values after streaming_done().
MOMENTUM_BN_INLINE void stream_bits(void* to, const Bits& bits) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm512_stream_si512(static_cast<__m512i*>(to), std::bit_cast<__m512i>(bits));
#elif defined(CPU_CAPABILITY_AVX2)
  _mm256_stream_si256(static_cast<__m256i*>(to), std::bit_cast<__m256i>(bits));
#else
  std::memcpy(to, &bits, sizeof(bits));
#endif
}

/// Whether a type is worth a variant of the kernels which streams.
template <typename T>
constexpr bool kStreams = std::is_same_v<T, float> || std::is_same_v<T, c10::BFloat16>;

inline void streaming_done() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

inline bool can_stream_to(const void* to) { return reinterpret_cast<uintptr_t>(to) % sizeof(Bits) == 0; }

/// Asks for the cache line of `address`, any address, to be brought into the second-level cache, for what is read soon.
MOMENTUM_BN_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

/// Holds as many values as a register of T does, in Accumulate<T>: in one register, or in two for the 16-bit types.
template <typename T>
struct Pack {
  using A = Accumulate<T>;
  using V = at::vec::Vectorized<A>;
  static constexpr int64_t kSize = at::vec::Vectorized<T>::size();
  static constexpr int kRegisters = static_cast<int>(kSize / V::size());

  V v[kRegisters];

  MOMENTUM_BN_INLINE static Pack all(A value) {
    Pack p;
    for (auto& r : p.v) {
      r = V(value);
    }
    return p;
  }

  MOMENTUM_BN_INLINE static Pack load(const T* from) { return widen(at::vec::Vectorized<T>::loadu(from)); }
  /// Loads the first `count` values; the rest is 0.
  MOMENTUM_BN_INLINE static Pack load(const T* from, int64_t count) {
    return widen(at::vec::Vectorized<T>::loadu(from, count));
  }
  /// Loads the same values as load, in an order of their own that is the same for all packs: that is cheaper, where it
  /// will do.
  MOMENTUM_BN_INLINE static Pack load_any_order(const T* from) {
    if constexpr (kReorders) {
      Bits bits;
      std::memcpy(&bits, from, sizeof(bits));
      return split(bits);
    } else {
      return load(from);
    }
  }
  MOMENTUM_BN_INLINE static Pack load_any_order(const T* from, int64_t count) {
    if constexpr (kReorders) {
      Bits bits = {};
      std::memcpy(&bits, from, static_cast<size_t>(count) * sizeof(T));
      return split(bits);
    } else {
      return load(from, count);
    }
  }
  /// Tells where that order has the i-th value of a pack.
  static constexpr int64_t place(int64_t i) { return kReorders ? i / 2 + i % 2 * V::size() : i; }

  /// Loads values that are stored in the accumulate type already.
  MOMENTUM_BN_INLINE static Pack load_wide(const A* from) {
    Pack p;
    for (int i = 0; i < kRegisters; ++i) {
      p.v[i] = V::loadu(from + i * V::size());
    }
    return p;
  }

  template <bool kStream = false>
  MOMENTUM_BN_INLINE void store(T* to) const {
    if constexpr (kStream) {
      stream_bits(to, std::bit_cast<Bits>(narrow()));
    } else {
      narrow().store(to);
    }
  }
  MOMENTUM_BN_INLINE void store(T* to, int64_t count) const { narrow().store(to, static_cast<int>(count)); }
  MOMENTUM_BN_INLINE void store_wide(A* to) const {
    for (int i = 0; i < kRegisters; ++i) {
      v[i].store(to + i * V::size());
    }
  }
  /// Writes what load_any_order read back to its places.
  template <bool kStream>
  MOMENTUM_BN_INLINE void store_any_order(T* to) const {
    const Bits bits = narrow_any_order();
    if constexpr (kStream) {
      stream_bits(to, bits);
    } else {
      std::memcpy(to, &bits, sizeof(bits));
    }
  }

  MOMENTUM_BN_INLINE void store_any_order(T* to, int64_t count) const {
    const Bits bits = narrow_any_order();
    std::memcpy(to, &bits, static_cast<size_t>(count) * sizeof(T));
  }

  /// Returns the pack with 0 in place of all values from `count` on.
  MOMENTUM_BN_INLINE Pack first(int64_t count) const {
    Pack p;
    for (int i = 0; i < kRegisters; ++i) {
      p.v[i] = V::set(V(0), v[i], std::clamp<int64_t>(count - i * V::size(), 0, V::size()));
    }
    return p;
  }

  MOMENTUM_BN_INLINE friend Pack operator+(const Pack& a, const Pack& b) {
    Pack p;
    for (int i = 0; i < kRegisters; ++i) {
      p.v[i] = a.v[i] + b.v[i];
    }
    return p;
  }
  MOMENTUM_BN_INLINE friend Pack operator-(const Pack& a, const Pack& b) {
    Pack p;
    for (int i = 0; i < kRegisters; ++i) {
      p.v[i] = a.v[i] - b.v[i];
    }
    return p;
  }
  MOMENTUM_BN_INLINE friend Pack operator*(const Pack& a, const Pack& b) {
    Pack p;
    for (int i = 0; i < kRegisters; ++i) {
      p.v[i] = a.v[i] * b.v[i];
    }
    return p;
  }
  /// Returns a * b + c.
  MOMENTUM_BN_INLINE friend Pack multiply_add(const Pack& a, const Pack& b, const Pack& c) {
    Pack p;
    for (int i = 0; i < kRegisters; ++i) {
      p.v[i] = at::vec::fmadd(a.v[i], b.v[i], c.v[i]);
    }
    return p;
  }
  /// Returns (x - center) * scale + shift with the same bits for every instruction set: it is fused for float, and done
  /// in two steps for double.
  MOMENTUM_BN_INLINE friend Pack normalized(const Pack& x, const Pack& center, const Pack& scale, const Pack& shift) {
    Pack p;
    for (int i = 0; i < kRegisters; ++i) {
      const V d = x.v[i] - center.v[i];
      if constexpr (std::is_same_v<A, double>) {
        p.v[i] = d * scale.v[i] + shift.v[i];
      } else {
        p.v[i] = fused(d, scale.v[i], shift.v[i]);
      }
    }
    return p;
  }
  /// Returns (g - offset) * scale + (d * deviation_scale + rest), where d is x - center.
  MOMENTUM_BN_INLINE friend Pack input_gradient(const Pack& g, const Pack& d, const Pack& scale, const Pack& offset,
                                                const Pack& deviation_scale, const Pack& rest) {
    return multiply_add(g - offset, scale, multiply_add(d, deviation_scale, rest));
  }
  /// Returns max(0, a), and NaN where a is NaN.
  MOMENTUM_BN_INLINE friend Pack relu(const Pack& a) {
    Pack p;
    for (int i = 0; i < kRegisters; ++i) {
      p.v[i] = at::vec::clamp_min(a.v[i], V(0));
    }
    return p;
  }
  /// Returns 0 where y is stored as 0 or less, else g, also where y is NaN, as in torch's threshold_backward.
  MOMENTUM_BN_INLINE friend Pack masked(const Pack& y, const Pack& g) {
    Pack p;
    for (int i = 0; i < kRegisters; ++i) {
      p.v[i] = V::blendv(g.v[i], V(0), y.v[i] <= V(kStoredAsZero<T>));
    }
    return p;
  }

 private:
  static constexpr bool kReorders = std::is_same_v<T, c10::BFloat16>;
  static constexpr uint32_t kUpperHalf = 0xffff0000;

  MOMENTUM_BN_INLINE static Pack split(const Bits& bits) {
    Pack p;
    p.v[0] = std::bit_cast<V>(bits << 16);
    p.v[1] = std::bit_cast<V>(bits & kUpperHalf);
    return p;
  }

  /// Returns a * b + c, rounded once.
  MOMENTUM_BN_INLINE static V fused(const V& a, const V& b, const V& c) {
#if defined(CPU_CAPABILITY_DEFAULT) && defined(__x86_64__)
    // There is no such instruction. The product is exact in double.
    V result;
    for (int64_t i = 0; i < V::size(); ++i) {
      result[static_cast<int>(i)] =
          static_cast<float>(static_cast<double>(a[i]) * static_cast<double>(b[i]) + static_cast<double>(c[i]));
    }
    return result;
#else
    return at::vec::fmadd(a, b, c);
#endif
  }

  MOMENTUM_BN_INLINE static Pack widen(const at::vec::Vectorized<T>& values) {
    Pack p;
    if constexpr (kRegisters == 1) {
      p.v[0] = values;
    } else {
      std::tie(p.v[0], p.v[1]) = at::vec::convert_to_float<T>(values);
    }
    return p;
  }

  MOMENTUM_BN_INLINE at::vec::Vectorized<T> narrow() const {
    if constexpr (kRegisters == 1) {
      return v[0];
    } else {
      return at::vec::convert_from_float<T>(v[0], v[1]);
    }
  }

  MOMENTUM_BN_INLINE Bits narrow_any_order() const {
    if constexpr (kReorders) {
      return (rounded_to_upper_half(v[0]) >> 16) | (rounded_to_upper_half(v[1]) & kUpperHalf);
    } else {
      return std::bit_cast<Bits>(narrow());
    }
  }

  /// Rounds to nearest, ties to even. A NaN stays one: those that arithmetic brings forth, and those of bfloat16
  /// values, have no bits that a carry could start from.
  MOMENTUM_BN_INLINE static Bits rounded_to_upper_half(const V& value) {
    const auto bits = std::bit_cast<Bits>(value);
    return bits + ((bits >> 16) & 1) + 0x7fff;
  }
};

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
