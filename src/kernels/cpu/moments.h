#pragma once

#include "kernels/cpu/pack.h"

#include <algorithm>
#include <cmath>
#include <limits>

// Mean and sum of squared deviations of a channel. What is summed is x - shift and its square, in the accumulate type
// over some values and in double over all. The shift is the mean of eight values, a power of 2 so that inputs whose
// sums are exact give the same bits in whatever order they are added. Where it turns out to lie far from the mean, in
// units of the deviation, the sums are formed again around the mean: nothing is ever squared that is much larger than
// the deviation. Parts of a channel are merged in double (Chan, Golub, LeVeque 1979).

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

/// Of x - shift and of its square.
struct Sums {
  double first;
  double second;
};

/// Deviations of the shift from the mean that cost the sum of squares less than its own rounding.
constexpr double kNear = 2;

/// Whether m2 can be told from sums around this shift.
inline bool shift_is_near(const Sums& sums, double count) {
  const double of_shift = sums.first * (sums.first / count);
  return of_shift <= kNear * kNear * (sums.second - of_shift);
}

inline Moments moments_of(const Sums& sums, double shift, double count) {
  const double mean = sums.first / count;
  return {count, shift + mean, std::max(0.0, sums.second - sums.first * mean)};
}

/// Of so many values the first shift is the mean.
constexpr int64_t kSamples = 8;

/// Added in pairs, so that of equal values the sum is exact.
template <typename A, typename Value>
A mean_of_samples(const Value& value) {
  const A sum = ((value(0) + value(1)) + (value(2) + value(3))) + ((value(4) + value(5)) + (value(6) + value(7)));
  const A mean = sum / static_cast<A>(kSamples);
  return std::isfinite(mean) ? mean : 0;
}

/// The shift to begin with, value(i) being the i-th of `count` values. Of fewer than kSamples some are taken again.
template <typename A, typename Value>
A first_shift(int64_t count, const Value& value) {
  return mean_of_samples<A>([&](int64_t i) { return static_cast<A>(value(count * i / kSamples)); });
}

/// One value after the other in double, for magnitudes whose squares the accumulate type does not hold.
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
  const Moments& get() const { return moments_; }

 private:
  Moments moments_;
};

/// A register that is summed up in double.
template <typename A>
class DoubleLanes {
  using V = at::vec::Vectorized<A>;

 public:
  void add(const V& values) {
    A lanes[V::size()];
    values.store(lanes);
    for (int64_t i = 0; i < V::size(); ++i) lanes_[i] += static_cast<double>(lanes[i]);
  }
  double sum() const {
    double sum = 0;
    for (const double lane : lanes_) sum += lane;
    return sum;
  }

 private:
  double lanes_[V::size()] = {};
};

/// So many values are added up in four registers of the accumulate type before these are emptied: 64 in each lane.
template <typename T>
constexpr int64_t kMostAtOnce = 64 * 4 * at::vec::Vectorized<Accumulate<T>>::size();

/// Sums over runs of consecutive values.
template <typename T>
class RunSums {
  using A = Accumulate<T>;
  using P = Pack<T>;
  using V = P::V;
  static constexpr int kPacks = 4 / P::kRegisters;

 public:
  explicit RunSums(A shift) : shift_(shift) {}

  /// Takes n values in. `ahead` values on from each, memory is asked for.
  void add(const T* x, int64_t n, int64_t ahead) {
    for (int64_t i = 0; i < n; i += kMostAtOnce<T>) {
      const int64_t part = std::min(kMostAtOnce<T>, n - i);
      shift_ == 0 ? add<false>(x + i, part, ahead) : add<true>(x + i, part, ahead);
    }
    count_ += n;
  }

  A shift() const { return shift_; }
  /// Values taken in.
  double count() const { return static_cast<double>(count_); }

  Sums get() const { return {first_.sum(), second_.sum()}; }

 private:
  template <bool kShifted>
  void add(const T* x, int64_t n, int64_t ahead) {
    const P shift = P::all(shift_);
    V first[4] = {V(0), V(0), V(0), V(0)};
    V second[4] = {V(0), V(0), V(0), V(0)};
    const auto take = [&](int pack, const P& d) {
      for (int r = 0; r < P::kRegisters; ++r) {
        const int at = pack * P::kRegisters + r;
        first[at] = first[at] + d.v[r];
        second[at] = at::vec::fmadd(d.v[r], d.v[r], second[at]);
      }
    };
    const auto shifted = [&](const P& values) { return kShifted ? values - shift : values; };
    int64_t i = 0;
    for (; i + kPacks * P::kSize <= n; i += kPacks * P::kSize) {
      for (int p = 0; p < kPacks; ++p) {
        const T* from = x + i + p * P::kSize;
        prefetch_far(from + ahead);
        take(p, shifted(P::load_any_order(from)));
      }
    }
    for (; i + P::kSize <= n; i += P::kSize) take(0, shifted(P::load_any_order(x + i)));
    if (i < n) take(0, shifted(P::load(x + i, n - i)).first(n - i));
    first_.add((first[0] + first[1]) + (first[2] + first[3]));
    second_.add((second[0] + second[1]) + (second[2] + second[3]));
  }

  A shift_;
  int64_t count_ = 0;
  DoubleLanes<A> first_;
  DoubleLanes<A> second_;
};

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
