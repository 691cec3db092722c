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
        first_(channels * plan.shape.inner, {values, 4}),
        second_(channels * plan.shape.inner, {values, 6}) {}

  /// @param shifts  those of the tile's channels
  void compute(const Tile& tile, const A* shifts, const Totals& totals) {
    const int64_t channels = tile.channels();
    const int64_t inner = plan_.shape.inner;
    const int64_t width = channels * inner;
    const T* x = values_ + tile.row_begin * plan_.columns + tile.channel_begin * inner;
    spread<T>(shifts, channels, inner, shift_.get());
    std::fill_n(totals.first, channels, 0.0);
    std::fill_n(totals.second, channels, 0.0);
    const RowOrder order(plan_.far, tile.rows(), kRowsAtOnce);
    constexpr int64_t kSteps = kRowsPerChunk / kRowsAtOnce;
    for (int64_t step = 0; step < order.steps; step += kSteps) {
      clear(width);
      for (int64_t i = step; i < std::min(step + kSteps, order.steps); ++i) {
        const T* from = x + i * order.next * plan_.columns;
        plan_.far ? add_rows<true>(from, order.apart, width) : add_rows<false>(from, order.apart, width);
      }
      flush(channels, totals);
    }
    if (order.rest == tile.rows()) {
      return;
    }
    clear(width);
    add_last_rows(x + order.rest * plan_.columns, width, tile.rows() - order.rest);
    flush(channels, totals);
  }

 private:
  void clear(int64_t width) {
    first_.clear(width + P::kSize);
    second_.clear(width + P::kSize);
  }

  void flush(int64_t channels, const Totals& totals) {
    from_any_order<T>(first_.get(), channels * plan_.shape.inner);
    from_any_order<T>(second_.get(), channels * plan_.shape.inner);
    add_columns(first_.get(), channels, plan_.shape.inner, totals.first);
    add_columns(second_.get(), channels, plan_.shape.inner, totals.second);
  }

  /// Adds kRowsAtOnce rows, with `apart` rows from one to the next.
  template <bool kFar>
  void add_rows(const T* x, int64_t apart, int64_t width) {
    const int64_t stride = apart * plan_.columns;
    // Where rows are neighbours, those of the next step are asked for.
    const int64_t ahead = kFar ? plan_.ahead / kRowsAtOnce : kRowsAtOnce * plan_.columns;
    const auto add_pack = [&](int64_t c, const auto& load) {
      const P shift = P::load_wide(shift_.get() + c);
      // Rows are added in pairs, for shorter chains.
      P first[2] = {P::load_wide(first_.get() + c), P::all(0)};
      P second[2] = {P::load_wide(second_.get() + c), P::all(0)};
      for (int64_t row = 0; row < kRowsAtOnce; ++row) {
        const T* from = x + row * stride + c;
        prefetch(from + ahead);
        const P d = load(from) - shift;
        first[row % 2] = first[row % 2] + d;
        second[row % 2] = multiply_add(d, d, second[row % 2]);
      }
      (first[0] + first[1]).store_wide(first_.get() + c);
      (second[0] + second[1]).store_wide(second_.get() + c);
    };
    int64_t c = 0;
    for (; c + P::kSize <= width; c += P::kSize) {
      add_pack(c, [&](const T* from) { return P::load_any_order(from); });
    }
    if (c < width) {
      add_pack(c, [&](const T* from) { return P::load_any_order(from, width - c); });
    }
  }

  /// Adds fewer rows than kRowsAtOnce.
  void add_last_rows(const T* x, int64_t width, int64_t rows) {
    for (int64_t c = 0; c < width; c += P::kSize) {
      const P shift = P::load_wide(shift_.get() + c);
      P first = P::load_wide(first_.get() + c);
      P second = P::load_wide(second_.get() + c);
      for (int64_t row = 0; row < rows; ++row) {
        const P d = P::load_any_order(x + row * plan_.columns + c, std::min(P::kSize, width - c)) - shift;
        first = first + d;
        second = multiply_add(d, d, second);
      }
      first.store_wide(first_.get() + c);
      second.store_wide(second_.get() + c);
    }
  }

  const ColumnPlan& plan_;
  const T* values_;
  // These are arrays of columns.
  Scratch<A> shift_;
  Scratch<A> first_;
  Scratch<A> second_;
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
