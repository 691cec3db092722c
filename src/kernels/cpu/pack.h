#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <type_traits>

// Included by sources that are compiled once per instruction set: everything lies in a namespace of that instruction
// set, so that no inline function compiled for one can stand in for another's.

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// The type in which values of type T are computed.
template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// As many values as a register of T holds, in Accumulate<T>: one register, or two for the 16-bit types.
template <typename T>
struct Pack {
  using A = Accumulate<T>;
  using V = at::vec::Vectorized<A>;
  static constexpr int64_t kSize = at::vec::Vectorized<T>::size();
  static constexpr int kRegisters = static_cast<int>(kSize / V::size());

  V v[kRegisters];

  static Pack all(A value) {
    Pack p;
    for (auto& r : p.v) r = V(value);
    return p;
  }

  static Pack load(const T* from) { return widen(at::vec::Vectorized<T>::loadu(from)); }
  /// The first `count` values; the rest is 0.
  static Pack load(const T* from, int64_t count) { return widen(at::vec::Vectorized<T>::loadu(from, count)); }

  /// Values that are stored in the accumulate type already.
  static Pack load_wide(const A* from) {
    Pack p;
    for (int i = 0; i < kRegisters; ++i) p.v[i] = V::loadu(from + i * V::size());
    return p;
  }

  void store(T* to) const { narrow().store(to); }
  void store(T* to, int64_t count) const { narrow().store(to, static_cast<int>(count)); }
  void store_wide(A* to) const {
    for (int i = 0; i < kRegisters; ++i) v[i].store(to + i * V::size());
  }

  friend Pack operator+(const Pack& a, const Pack& b) {
    Pack p;
    for (int i = 0; i < kRegisters; ++i) p.v[i] = a.v[i] + b.v[i];
    return p;
  }
  friend Pack operator-(const Pack& a, const Pack& b) {
    Pack p;
    for (int i = 0; i < kRegisters; ++i) p.v[i] = a.v[i] - b.v[i];
    return p;
  }
  friend Pack operator*(const Pack& a, const Pack& b) {
    Pack p;
    for (int i = 0; i < kRegisters; ++i) p.v[i] = a.v[i] * b.v[i];
    return p;
  }
  /// a * b + c
  friend Pack multiply_add(const Pack& a, const Pack& b, const Pack& c) {
    Pack p;
    for (int i = 0; i < kRegisters; ++i) p.v[i] = at::vec::fmadd(a.v[i], b.v[i], c.v[i]);
    return p;
  }
  /// max(0, a), NaN where a is NaN.
  friend Pack relu(const Pack& a) {
    Pack p;
    for (int i = 0; i < kRegisters; ++i) p.v[i] = at::vec::clamp_min(a.v[i], V(0));
    return p;
  }
  /// g where y > 0, else 0.
  friend Pack where_positive(const Pack& y, const Pack& g) {
    Pack p;
    for (int i = 0; i < kRegisters; ++i) p.v[i] = V::blendv(V(0), g.v[i], y.v[i] > V(0));
    return p;
  }

 private:
  static Pack widen(const at::vec::Vectorized<T>& values) {
    Pack p;
    if constexpr (kRegisters == 1) {
      p.v[0] = values;
    } else {
      std::tie(p.v[0], p.v[1]) = at::vec::convert_to_float<T>(values);
    }
    return p;
  }

  at::vec::Vectorized<T> narrow() const {
    if constexpr (kRegisters == 1) {
      return v[0];
    } else {
      return at::vec::convert_from_float<T>(v[0], v[1]);
    }
  }
};

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
