#pragma once

#include "kernels/cpu/blend.h"
#include "kernels/cpu/moments.h"
#include "kernels/cpu/normalize_run.h"
#include "kernels/cpu/simd/pack.h"
#include "kernels/cpu/simd/scratch.h"

#include <algorithm>

// This file leads from arrays of channels to arrays of columns, and back.

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// Puts whole packs of columns' values into the order of Pack::load_any_order.
template <typename T>
void to_any_order(Accumulate<T>* values, int64_t count) {
  using P = Pack<T>;
  if constexpr (P::place(1) != 1) {
    for (int64_t c = 0; c < count; c += P::kSize) {
      Accumulate<T> pack[P::kSize];
      for (int64_t i = 0; i < P::kSize; ++i) {
        pack[P::place(i)] = values[c + i];
      }
      std::copy_n(pack, P::kSize, values + c);
    }
  }
}

/// Puts them back into the order of memory.
template <typename T, typename Value>
void from_any_order(Value* values, int64_t count) {
  using P = Pack<T>;
  if constexpr (P::place(1) != 1) {
    for (int64_t c = 0; c < count; c += P::kSize) {
      Value pack[P::kSize];
      for (int64_t i = 0; i < P::kSize; ++i) {
        pack[i] = values[c + P::place(i)];
      }
      std::copy_n(pack, P::kSize, values + c);
    }
  }
}

/// to[k * inner + i] = values[k], in the order of Pack::load_any_order; what follows the last column is 0.
template <typename T>
void spread(const Accumulate<T>* values, int64_t channels, int64_t inner, Accumulate<T>* to) {
  using P = Pack<T>;
  const int64_t width = channels * inner;
  if (inner == 1) {
    std::copy_n(values, channels, to);
  } else {
    // Whole vectors are written: what a channel writes beyond its end, the next one overwrites, and the last one's end
    // is padding.
    Accumulate<T>* of_channel = to;
    for (int64_t k = 0; k < channels; ++k, of_channel += inner) {
      const auto value = P::all(values[k]);
      for (int64_t i = 0; i < inner; i += P::kSize) {
        value.store_wide(of_channel + i);
      }
    }
  }
  std::fill_n(to + width, P::kSize, Accumulate<T>(0));
  to_any_order<T>(to, width);
}

/// totals[k] += the sum of channel k's columns
template <typename A>
void add_columns(const A* __restrict columns, int64_t channels, int64_t inner, double* __restrict totals) {
  if (inner == 1) {
    for (int64_t k = 0; k < channels; ++k) {
      totals[k] += static_cast<double>(columns[k]);
    }
    return;
  }
  constexpr int64_t kLanes = 8;
  for (int64_t k = 0; k < channels; ++k, columns += inner) {
    double lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= inner; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        lanes[lane] += static_cast<double>(columns[i + lane]);
      }
    }
    for (int64_t lane = 0; i + lane < inner; ++lane) {
      lanes[lane] += static_cast<double>(columns[i + lane]);
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      totals[k] += lanes[lane];
    }
  }
}

/// Adds up two terms per value over the rows of a tile, for each column and then for each channel.
/// @tparam kMostRows  So many rows are added up in the accumulate type before their sums go into double: the error of a
///                    sum grows with them.
template <typename T, int64_t kMostRows>
class SumsPerColumn {
  using A = Accumulate<T>;
  using P = Pack<T>;

 public:
  /// @param apart  says where the first of four arrays lies
  SumsPerColumn(int64_t columns, const Apart& apart)
      : first_(columns, apart.values, apart.eighth), second_(columns, apart.values, apart.eighth + 2) {}

  /// Begins with a tile of so many columns.
  void begin(int64_t columns) {
    columns_ = columns;
    rows_ = 0;
    first_.clear(columns + P::kSize);
    second_.clear(columns + P::kSize);
  }
  /// Must be called before the terms of so many more rows are added.
  void next_rows(int64_t rows) {
    rows_ += rows;
    into_double_ = rows_ >= kMostRows;
    rows_ = into_double_ ? 0 : rows_;
  }
  /// Adds what these rows' terms of a pack of columns come to.
  MOMENTUM_BN_INLINE void add_first(int64_t column, const P& terms) { first_.add(column, terms, into_double_); }
  MOMENTUM_BN_INLINE void add_second(int64_t column, const P& terms) { second_.add(column, terms, into_double_); }

  /// Writes the sums over all rows, of channels.
  void end(int64_t channels, int64_t inner, double* first, double* second) {
    first_.end(columns_, rows_ > 0);
    second_.end(columns_, rows_ > 0);
    first_.write(channels, inner, first);
    second_.write(channels, inner, second);
  }

 private:
  class Columns {
   public:
    Columns(int64_t columns, const void* values, int eighth)
        : recent_(columns, {values, eighth}), all_(columns, {values, eighth + 1}) {}

    void clear(int64_t size) const {
      recent_.clear(size);
      all_.clear(size);
    }
    MOMENTUM_BN_INLINE void add(int64_t column, const P& terms, bool into_double) const {
      A* recent = recent_.get() + column;
      const P sums = P::load_wide(recent) + terms;
      if (into_double) {
        add_all(column, sums);
        P::all(0).store_wide(recent);
      } else {
        sums.store_wide(recent);
      }
    }
    void end(int64_t columns, bool any) const {
      for (int64_t c = 0; any && c < columns; c += P::kSize) {
        add_all(c, P::load_wide(recent_.get() + c));
      }
      from_any_order<T>(all_.get(), columns);
    }
    void write(int64_t channels, int64_t inner, double* to) const {
      std::fill_n(to, channels, 0.0);
      add_columns(all_.get(), channels, inner, to);
    }

   private:
    MOMENTUM_BN_INLINE void add_all(int64_t column, const P& sums) const {
      double* to = all_.get() + column;
      for (const auto& of_register : sums.v) {
        auto lanes = DoubleLanes<A>::load(to);
        lanes.add(of_register);
        lanes.store(to);
        to += P::V::size();
      }
    }

    Scratch<A> recent_;
    Scratch<double> all_;
  };

  Columns first_;
  Columns second_;
  int64_t columns_ = 0;
  int64_t rows_ = 0;  // whose sums are not in double yet
  bool into_double_ = false;
};

/// Holds a coefficient of some channels once for each of their columns.
template <typename T>
class PerColumn {
  using A = Accumulate<T>;

 public:
  PerColumn(int64_t columns, const Apart& apart) : values_(columns, apart) {}

  void set(const A* of_channels, int64_t channels, int64_t inner) {
    spread<T>(of_channels, channels, inner, values_.get());
  }
  MOMENTUM_BN_INLINE Pack<T> at(int64_t column) const { return Pack<T>::load_wide(values_.get() + column); }

 private:
  Scratch<A> values_;
};

/// Holds the coefficients that a forward pass normalises some channels with, once for each of their columns.
template <typename T>
class ForwardPerColumn {
  using A = Accumulate<T>;

 public:
  /// @param apart  says where the first of three arrays lies; they are an eighth of a page apart
  ForwardPerColumn(const Channels<A>& channels, int64_t begin, int64_t end, int64_t inner, const Apart& apart)
      : center_((end - begin) * inner, apart),
        scale_((end - begin) * inner, {apart.values, apart.eighth + 1}),
        shift_((end - begin) * inner, {apart.values, apart.eighth + 2}) {
    const int64_t count = end - begin;
    const Scratch<A> center(count);
    const Scratch<A> scale(count);
    const Scratch<A> shift(count);
    coefficients_of_channels(channels, begin, end, center.get(), scale.get(), shift.get());
    center_.set(center.get(), count, inner);
    scale_.set(scale.get(), count, inner);
    shift_.set(shift.get(), count, inner);
  }

  MOMENTUM_BN_INLINE PackCoefficients<T> at(int64_t column) const {
    return {center_.at(column), scale_.at(column), shift_.at(column)};
  }

 private:
  PerColumn<T> center_;
  PerColumn<T> scale_;
  PerColumn<T> shift_;
};

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
