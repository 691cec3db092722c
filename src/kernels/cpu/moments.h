#pragma once

#include "kernels/cpu/pack.h"

#include <algorithm>
#include <cmath>
#include <limits>

// Mean and sum of squared deviations. Values are summed in chunks, shifted by about their mean, in the accumulate type;
// chunks are merged in double (Chan, Golub, LeVeque 1979). The shift of a chunk is the mean of what came before it, of
// the first chunk its own mean, so that what is squared is never much larger than the deviation.

namespace momentum_bn::kernels::CPU_CAPABILITY {

struct Moments {
  double count = 0;
  double mean = 0;
  double m2 = 0;
};

inline void merge(Moments& into, const Moments& other) {
  if (other.count == 0) return;
  const double count = into.count + other.count;
  const double delta = other.mean - into.mean;
  into.mean += delta * (other.count / count);
  into.m2 += other.m2 + delta * delta * (into.count * (other.count / count));
  into.count = count;
}

struct Sums {
  double first;
  double second;
};

template <typename A>
double sum_of_lanes(const at::vec::Vectorized<A> (&registers)[4]) {
  A lanes[at::vec::Vectorized<A>::size()];
  ((registers[0] + registers[1]) + (registers[2] + registers[3])).store(lanes);
  double sum = 0;
  for (const A lane : lanes) sum += static_cast<double>(lane);
  return sum;
}

template <typename T>
double sum_of_packs(const Pack<T> (&packs)[4]) {
  double sum = 0;
  for (int r = 0; r < Pack<T>::kRegisters; ++r) {
    const typename Pack<T>::V registers[4] = {packs[0].v[r], packs[1].v[r], packs[2].v[r], packs[3].v[r]};
    sum += sum_of_lanes(registers);
  }
  return sum;
}

/// Sums of (x - shift) and of its squares. Asks for the `n` values from `ahead` on, if not null, to be brought near.
template <typename T>
Sums shifted_sums(const T* x, int64_t n, Accumulate<T> shift, const T* ahead) {
  using A = Accumulate<T>;
  using P = Pack<T>;
  using V = typename P::V;
  constexpr int kPacks = 4 / P::kRegisters;
  constexpr int64_t kStep = kPacks * P::kSize;
  V first[4] = {V(0), V(0), V(0), V(0)};
  V second[4] = {V(0), V(0), V(0), V(0)};
  const P shifts = P::all(shift);
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int p = 0; p < kPacks; ++p) {
      if (ahead) __builtin_prefetch(ahead + i + p * P::kSize);
      const P d = P::load(x + i + p * P::kSize) - shifts;
      for (int r = 0; r < P::kRegisters; ++r) {
        first[p * P::kRegisters + r] = first[p * P::kRegisters + r] + d.v[r];
        second[p * P::kRegisters + r] = at::vec::fmadd(d.v[r], d.v[r], second[p * P::kRegisters + r]);
      }
    }
  }
  Sums sums = {sum_of_lanes(first), sum_of_lanes(second)};
  for (; i < n; ++i) {
    const double d = static_cast<double>(static_cast<A>(x[i]) - shift);
    sums.first += d;
    sums.second += d * d;
  }
  return sums;
}

/// The same in double throughout, for magnitudes whose squares the accumulate type does not hold.
template <typename T>
Moments moments_in_double(const T* x, int64_t n) {
  const auto value = [x](int64_t i) { return static_cast<double>(static_cast<Accumulate<T>>(x[i])); };
  Moments moments = {static_cast<double>(n), 0, 0};
  for (int64_t i = 0; i < n; ++i) moments.mean += value(i) / moments.count;
  for (int64_t i = 0; i < n; ++i) moments.m2 += (value(i) - moments.mean) * (value(i) - moments.mean);
  return moments;
}

/// Takes the n values from x on into `into`.
template <typename T>
void add_chunk(Moments& into, const T* x, int64_t n, const T* ahead) {
  using A = Accumulate<T>;
  const double count = static_cast<double>(n);
  A shift = static_cast<A>(into.mean);
  if (into.count == 0) {
    shift = static_cast<A>(shifted_sums<T>(x, n, 0, nullptr).first / count);
    if (!std::isfinite(shift)) shift = 0;
  }
  const Sums sums = shifted_sums<T>(x, n, shift, ahead);
  const double mean = sums.first / count;
  const bool fits = std::isfinite(sums.second);
  merge(into, fits ? Moments{count, static_cast<double>(shift) + mean, std::max(0.0, sums.second - sums.first * mean)}
                   : moments_in_double(x, n));
}

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
