#pragma once

#include "kernels/channel_rules.h"
#include "kernels/cpu/simd/pack.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <type_traits>

// This file forms the mean and the sum of squared deviations of a channel. What is summed is x - shift and its square,
// in the accumulate type over some values and in double over all. The shift is the mean of eight values, a power of 2
// so that inputs whose sums are exact give the same bits in whatever order they are added. Where it turns out to lie
// far from the mean, in units of the deviation, the sums are formed again around the mean: nothing is ever squared that
// is much larger than the deviation. Parts of a channel are merged in double (Chan, Golub, LeVeque 1979).

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// The sums of x - shift and of its square.
struct Sums {
  double first;
  double second;
};

/// A shift this many deviations away from the mean costs the sum of squares less than its own rounding.
constexpr double kNear = 2;

/// Tells whether m2 can be had from sums around this shift.
inline bool shift_is_near(const Sums& sums, double count) {
  const double of_shift = sums.first * (sums.first / count);
  return of_shift <= kNear * kNear * (sums.second - of_shift);
}

inline BatchMoments moments_of(const Sums& sums, double shift, double count) {
  const double mean = sums.first / count;
  return {shift + mean, std::max(0.0, sums.second - sums.first * mean), count};
}

/// The first shift is the mean of so many values.
constexpr int64_t kSamples = 8;

/// Adds the samples in pairs, so that the sum of equal values is exact, and rounds their mean to about the spacing of
/// the values: else all values of one power of 2 would be rounded by the same amount when it is subtracted.
template <typename A, typename Value>
A mean_of_samples(const Value& value) {
  const auto in_pairs = [](const auto& of) {
    return ((of(0) + of(1)) + (of(2) + of(3))) + ((of(4) + of(5)) + (of(6) + of(7)));
  };
  const A mean = in_pairs(value) / static_cast<A>(kSamples);
  const A magnitude = in_pairs([&](int64_t i) { return std::fabs(value(i)); });
  const A rounded = rounded_to_spacing_at(4 * magnitude, mean);
  return std::isfinite(rounded) ? rounded : 0;
}

/// Returns the shift to begin with, value(i) being the i-th of `count` values. Where there are fewer than kSamples,
/// some are taken twice.
template <typename A, typename Value>
A first_shift(int64_t count, const Value& value) {
  return mean_of_samples<A>([&](int64_t i) { return static_cast<A>(value(count * i / kSamples)); });
}

/// Takes one value after the other in, in double, for magnitudes whose squares the accumulate type does not hold.
class DoubleMoments {
 public:
  template <typename T>
  void add(T x) {
    const double value = static_cast<double>(static_cast<Accumulate<T>>(x));
    moments_.count += 1;
    const double delta = value - moments_.mean;
    moments_.mean += delta / moments_.count;
    moments_.m2 += delta * (value - moments_.mean);
  }
  const BatchMoments& get() const { return moments_; }

 private:
  BatchMoments moments_ = {0, 0, 0};
};

/// Adds registers in pairs and overwrites them.
template <typename V, int kCount>
MOMENTUM_BN_INLINE V sum_of(V (&registers)[kCount]) {
#pragma GCC unroll 4
  for (int step = 1; step < kCount; step *= 2) {
#pragma GCC unroll 8
    for (int r = 0; r < kCount; r += 2 * step) {
      registers[r] = registers[r] + registers[r + step];
    }
  }
  return registers[0];
}

// Vector types of GCC and Clang: half a register of floats, and a register of doubles.
using HalfOfFloats [[gnu::vector_size(sizeof(Bits) / 2)]] = float;
using DoubleRegister [[gnu::vector_size(sizeof(Bits))]] = double;

/// Sums registers up in double.
template <typename A>
class DoubleLanes {
  using V = at::vec::Vectorized<A>;

 public:
  /// The sums of so many lanes that are stored.
  MOMENTUM_BN_INLINE static DoubleLanes load(const double* from) {
    DoubleLanes result;
    std::memcpy(&result.registers_, from, sizeof(registers_));
    return result;
  }
  MOMENTUM_BN_INLINE void store(double* to) const { std::memcpy(to, &registers_, sizeof(registers_)); }

  MOMENTUM_BN_INLINE void add(const V& values) {
    if constexpr (kRegisters == 1) {
      registers_[0] += std::bit_cast<DoubleRegister>(values);
    } else {
      const auto halves = std::bit_cast<std::array<HalfOfFloats, kRegisters>>(values);
      for (size_t r = 0; r < kRegisters; ++r) {
        registers_[r] += __builtin_convertvector(halves[r], DoubleRegister);
      }
    }
  }
  double sum() const {
    double lanes[V::size()];
    static_assert(sizeof(lanes) == sizeof(registers_));
    store(lanes);
    double sum = 0;
    for (const double lane : lanes) {
      sum += lane;
    }
    return sum;
  }

 private:
  static constexpr size_t kRegisters = std::is_same_v<A, double> ? 1 : 2;

  std::array<DoubleRegister, kRegisters> registers_ = {};
};

/// So many values of each lane are added up in a register of the accumulate type before it is flushed into double.
constexpr int64_t kMostPerLane = 64;
/// Sums over one run are spread over so many registers, for shorter chains.
constexpr int kSpread = 4;
/// So many values of one run are added up at once.
template <typename T>
constexpr int64_t kMostAtOnce = kMostPerLane * kSpread * at::vec::Vectorized<Accumulate<T>>::size();

/// So many runs are read together: memory is read faster in several places at once, each in order, and the processor
/// has registers for the sums of so many.
constexpr int kTogether = kHas32Registers ? 8 : 4;
/// Each of them is asked for this many bytes in advance: about 8 KB in all.
constexpr int64_t kAheadTogether = int64_t{8} * 1024 / kTogether;

/// The addresses where runs begin that are read together.
template <typename T>
using Together = std::array<const T*, kTogether>;

/// Sums over runs of consecutive values.
template <typename T>
class RunSums {
  using A = Accumulate<T>;
  using P = Pack<T>;
  using V = P::V;

 public:
  explicit RunSums(A shift) : shift_(shift) {}

  /// Takes a run of n values in.
  void add(const T* x, int64_t n) {
    for (int64_t i = 0; i < n; i += kMostAtOnce<T>) {
      const int64_t part = std::min(kMostAtOnce<T>, n - i);
      shift_ == 0 ? add_one<false>(x + i, part) : add_one<true>(x + i, part);
    }
    count_ += n;
  }

  /// Takes several runs of n values each in.
  void add(const Together<T>& x, int64_t n) {
    constexpr int64_t kMost = kMostPerLane * V::size();
    const int64_t in_packs = n / P::kSize * P::kSize;
    for (int64_t i = 0; i < in_packs; i += kMost) {
      const int64_t end = std::min(i + kMost, in_packs);
      shift_ == 0 ? add_together<false>(x, i, end) : add_together<true>(x, i, end);
    }
    count_ += in_packs * kTogether;
    if (in_packs == n) {
      return;
    }
    for (const T* run : x) {
      add(run + in_packs, n - in_packs);
    }
  }

  A shift() const { return shift_; }
  /// The number of values taken in.
  double count() const { return static_cast<double>(count_); }

  Sums get() const { return {first_.sum(), second_.sum()}; }

 private:
  template <bool kShifted>
  void add_one(const T* x, int64_t n) {
    constexpr int kPacks = kSpread / P::kRegisters;
    Registers<kSpread> registers(shift_);
    int64_t i = 0;
    for (; i + kPacks * P::kSize <= n; i += kPacks * P::kSize) {
      for (int p = 0; p < kPacks; ++p) {
        registers.template take<kShifted>(p * P::kRegisters, P::load_any_order(x + i + p * P::kSize));
      }
    }
    for (; i + P::kSize <= n; i += P::kSize) {
      registers.template take<kShifted>(0, P::load_any_order(x + i));
    }
    if (i < n) {
      registers.template take_first<kShifted>(0, x + i, n - i);
    }
    flush(registers);
  }

  /// Takes the values [i, end) of each run in; they are whole packs.
  template <bool kShifted>
  void add_together(const Together<T>& x, int64_t i, int64_t end) {
    constexpr int64_t kAhead = kAheadTogether / static_cast<int64_t>(sizeof(T));
    Registers<kTogether> registers(shift_);
    for (; i < end; i += P::kSize) {
#pragma GCC unroll 8
      for (int r = 0; r < kTogether; ++r) {
        const T* from = x[static_cast<size_t>(r)] + i;
        prefetch(from + kAhead);
        registers.template take<kShifted, true>(r, P::load_any_order(from));
      }
    }
    flush(registers);
  }

  template <int kCount>
  struct Registers {
    explicit Registers(A shift_by) : shift(P::all(shift_by)) {
#pragma GCC unroll 8
      for (int r = 0; r < kCount; ++r) {
        first[r] = second[r] = V(0);
      }
    }

    /// With kInOne a pack goes into one register, else into neighbouring ones.
    template <bool kShifted, bool kInOne = false>
    MOMENTUM_BN_INLINE void take(int at, const P& values) {
      add<kInOne>(at, kShifted ? values - shift : values);
    }
    /// Takes the first `count` values in.
    template <bool kShifted>
    MOMENTUM_BN_INLINE void take_first(int at, const T* from, int64_t count) {
      const P values = P::load(from, count);
      add<false>(at, (kShifted ? values - shift : values).first(count));
    }

    template <bool kInOne>
    MOMENTUM_BN_INLINE void add(int at, const P& d) {
      for (int r = 0; r < P::kRegisters; ++r) {
        const int to = kInOne ? at : at + r;
        first[to] = first[to] + d.v[r];
        second[to] = at::vec::fmadd(d.v[r], d.v[r], second[to]);
      }
    }

    P shift;
    V first[kCount];
    V second[kCount];
  };

  template <int kCount>
  void flush(Registers<kCount>& registers) {
    first_.add(sum_of(registers.first));
    second_.add(sum_of(registers.second));
  }

  A shift_;
  int64_t count_ = 0;
  DoubleLanes<A> first_;
  DoubleLanes<A> second_;
};

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
