#pragma once

#include "kernels/cpu/columns/per_column.h"
#include "kernels/cpu/columns/plan.h"
#include "kernels/cpu/moments.h"
#include "kernels/cpu/simd/scratch.h"

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// The sums of x - shift and of its square, of channels.
struct Totals {
  double* first;
  double* second;
};

/// Forms the totals of tiles.
template <typename T>
class TileTotals {
  using A = Accumulate<T>;
  using P = Pack<T>;

 public:
  /// Prepares for tiles of `values` that have at most so many channels.
  TileTotals(const ColumnPlan& plan, const T* values, int64_t channels)
      : plan_(plan),
        values_(values),
        shift_(channels * plan.shape.inner, {values, 2}),
        sums_(channels * plan.shape.inner, {values, 4}) {}

  /// @param shifts  those of the tile's channels
  void compute(const Tile& tile, const A* shifts, const Totals& totals) {
    const int64_t channels = tile.channels();
    const int64_t inner = plan_.shape.inner;
    const int64_t width = channels * inner;
    const T* x = values_ + tile.row_begin * plan_.columns + tile.channel_begin * inner;
    spread<T>(shifts, channels, inner, shift_.get());
    sums_.begin(width);
    const int64_t rest = plan_.far ? add_all<kRowsAtOnce, true>(x, 0, tile.rows(), width)
                                   : add_all<kRowsAtOnce, false>(x, 0, tile.rows(), width);
    add_all<1, false>(x, rest, tile.rows(), width);
    sums_.end(channels, inner, totals.first, totals.second);
  }

 private:
  /// Adds rows of the tile from `begin` on, kRows at a time.
  /// @return the first row that is left
  template <int64_t kRows, bool kFar>
  int64_t add_all(const T* x, int64_t begin, int64_t end, int64_t width) {
    const RowOrder order(kFar, end - begin, kRows);
    for (int64_t i = 0; i < order.steps; ++i) {
      add_rows<kRows, kFar>(x + (begin + i * order.next) * plan_.columns, order.apart, width);
    }
    return begin + order.rest;
  }

  /// Adds kRows rows, with `apart` rows from one to the next.
  template <int64_t kRows, bool kFar>
  void add_rows(const T* x, int64_t apart, int64_t width) {
    const int64_t stride = apart * plan_.columns;
    // Where rows are neighbours, those of the next step are asked for.
    const int64_t ahead = kFar ? plan_.ahead / kRows : kRows * plan_.columns;
    sums_.next_rows(kRows);
    int64_t c = 0;
    for (; c + P::kSize <= width; c += P::kSize) {
      add_pack<kRows>(x + c, c, stride, ahead, [](const T* from) { return P::load_any_order(from); });
    }
    if (c < width) {
      add_pack<kRows>(x + c, c, stride, ahead, [=](const T* from) { return P::load_any_order(from, width - c); });
    }
  }

  /// Adds kRows rows of a pack of columns. The rows are added up in chains of four, which are short.
  template <int64_t kRows, typename Load>
  MOMENTUM_BN_INLINE void add_pack(const T* x, int64_t c, int64_t stride, int64_t ahead, const Load& load) {
    constexpr int64_t kChains = kRows < 4 ? 1 : kRows / 4;
    const P shift = P::load_wide(shift_.get() + c);
    P first[kChains];
    P second[kChains];
#pragma GCC unroll 8
    for (int64_t row = 0; row < kRows; ++row) {
      const T* from = x + row * stride;
      prefetch(from + ahead);
      const P d = load(from) - shift;
      const int64_t chain = row % kChains;
      first[chain] = row < kChains ? d : first[chain] + d;
      second[chain] = row < kChains ? d * d : multiply_add(d, d, second[chain]);
    }
    sums_.add_first(c, sum_of(first));
    sums_.add_second(c, sum_of(second));
  }

  const ColumnPlan& plan_;
  const T* values_;
  Scratch<A> shift_;  // of columns
  SumsPerColumn<T, 64> sums_;
};

/// Writes the shifts to begin with, of channels whose first row begins at x.
template <typename T>
void first_shifts(const ColumnPlan& plan, const T* x, int64_t channels, Accumulate<T>* shifts) {
  using A = Accumulate<T>;
  const int64_t inner = plan.shape.inner;
  const int64_t count = plan.shape.values_per_channel();
  if (inner > 1) {
    for (int64_t k = 0; k < channels; ++k) {
      shifts[k] = first_shift<A>(count, [&](int64_t i) { return x[i / inner * plan.columns + k * inner + i % inner]; });
    }
    return;
  }
  const T* rows[kSamples];
  for (int64_t i = 0; i < kSamples; ++i) {
    rows[i] = x + count * i / kSamples * plan.columns;
  }
  for (int64_t k = 0; k < channels; ++k) {
    shifts[k] = mean_of_samples<A>([&](int64_t i) { return static_cast<A>(rows[i][k]); });
  }
}

/// Moves shifts that lie far from the mean to it.
/// @return whether there were any, so that the totals must be formed again
template <typename A>
bool move_far_shifts(const Totals& totals, int64_t channels, double count, A* shifts) {
  int64_t all_near = 1;
  for (int64_t k = 0; k < channels; ++k) {
    all_near &= static_cast<int64_t>(shift_is_near({totals.first[k], totals.second[k]}, count));
  }
  if (all_near) {
    return false;
  }
  bool any = false;
  for (int64_t k = 0; k < channels; ++k) {
    const Sums sums = {totals.first[k], totals.second[k]};
    const auto mean = static_cast<A>(moments_of(sums, shifts[k], count).mean);
    if (shift_is_near(sums, count) || !std::isfinite(mean)) {
      continue;
    }
    shifts[k] = mean;
    any = true;
  }
  return any;
}

/// Writes mean and m2 of channels, from their totals or, where these overflow, from x, their first value.
template <typename T>
void moments_of_channels(const ColumnPlan& plan, const T* x, const Totals& totals, const Accumulate<T>* shifts,
                         int64_t channels, double* __restrict mean, double* __restrict m2) {
  const double count = static_cast<double>(plan.shape.values_per_channel());
  const double* __restrict first = totals.first;
  const double* __restrict second = totals.second;
  int64_t all_fit = 1;
  for (int64_t k = 0; k < channels; ++k) {
    const double of_shifted = first[k] / count;
    const double squares = second[k] - first[k] * of_shifted;
    mean[k] = static_cast<double>(shifts[k]) + of_shifted;
    m2[k] = squares > 0 ? squares : 0;
    all_fit &= static_cast<int64_t>(std::isfinite(second[k]));
  }
  if (all_fit) {
    return;
  }
  for (int64_t k = 0; k < channels; ++k) {
    if (std::isfinite(second[k])) {
      continue;
    }
    DoubleMoments moments;
    for (int64_t row = 0; row < plan.rows; ++row) {
      for (int64_t i = 0; i < plan.shape.inner; ++i) {
        moments.add(x[row * plan.columns + k * plan.shape.inner + i]);
      }
    }
    mean[k] = moments.get().mean;
    m2[k] = moments.get().m2;
  }
}

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
