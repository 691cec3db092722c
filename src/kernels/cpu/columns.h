#pragma once

#include "kernels/cpu/backward_run.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/moments.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"

#include <numeric>

// [outer][channels][inner] with short planes or none: rows of channels * inner columns, each column part of one
// channel. Where a block of columns fits the cache over all rows, blocks are tasks and a block's second read comes from
// the cache. Otherwise segments of rows are tasks; their number depends on the shape alone and they are added up in
// order: the same bits for any number of threads.

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// Rows that are added up in registers before their sums go to the accumulators. Rows that come from memory are taken
/// from so many places at once, each read in order: faster than in one.
constexpr int64_t kRowsAtOnce = 8;
/// Rows that are normalised, or taken backward, together: their columns' coefficients are read once.
constexpr int64_t kRowsTogether = 4;
/// Rows after which the accumulators are emptied into double: few enough for their rounding.
constexpr int64_t kRowsPerChunk = 64;
/// A block of columns is about so wide: longer runs of a row are read faster, accumulators of shorter ones stay near.
constexpr int64_t kBlockColumns = 512;
constexpr int64_t kAlignedColumns = 64;
/// A block of columns may take this many bytes over all rows, to be read again from the cache.
constexpr int64_t kBlockBytes = int64_t{512} * 1024;
/// A segment of rows is worth this many values.
constexpr int64_t kSegmentValues = int64_t{128} * 1024;
constexpr int64_t kMostSegments = 64;
/// So many channels' totals are a task.
constexpr int64_t kChannelsTogether = 512;
/// From this many bytes on values are taken to come from memory, which is then asked for them in advance.
constexpr int64_t kBeyondCaches = int64_t{16} * 1024 * 1024;
/// How far in advance, in bytes, over all places.
constexpr int64_t kAheadBytes = int64_t{8} * 1024;

struct ColumnPlan {
  ColumnPlan(const Shape& s, int64_t element_size)
      : shape(s), rows(s.outer), columns(s.channels * s.inner), channels_per_block(s.channels) {
    // Blocks begin and end with full vectors.
    const int64_t step = kAlignedColumns / std::gcd(kAlignedColumns, s.inner);
    const int64_t channels = std::min(divide_up(divide_up(kBlockColumns, s.inner), step) * step, s.channels);
    const bool fits = rows * channels * s.inner * element_size <= kBlockBytes;
    if (fits && s.channels >= 4 * channels) {
      channels_per_block = channels;
      blocks = divide_up(s.channels, channels);
      return;
    }
    segments = std::clamp<int64_t>(std::min(s.values() / kSegmentValues, rows / kRowsPerChunk), 1, kMostSegments);
    far = s.values() * element_size >= kBeyondCaches;
    ahead = kAheadBytes / element_size;
  }

  /// At whole groups of rows: inputs whose sums are exact stay so.
  int64_t segment_begin(int64_t segment) const {
    return segment == segments ? rows : rows * segment / segments / kRowsAtOnce * kRowsAtOnce;
  }
  int64_t block_begin(int64_t block) const { return block * channels_per_block; }
  int64_t block_end(int64_t block) const { return std::min(shape.channels, (block + 1) * channels_per_block); }

  Shape shape;
  int64_t rows;
  int64_t columns;  // of a row, which is also its stride
  int64_t channels_per_block;
  int64_t blocks = 1;
  int64_t segments = 1;
  bool far = false;   // rows follow each other and come from memory
  int64_t ahead = 0;  // values that are then asked for in advance, over all places
};

/// How a tile's rows are gone through: `together` of them at a time, `apart` rows from one to the next.
struct RowOrder {
  /// far: from `together` places at once; else neighbouring rows.
  RowOrder(bool far, int64_t rows, int64_t together)
      : steps(rows / together), apart(far ? steps : 1), next(far ? 1 : together), rest(steps * together) {}

  int64_t steps;
  int64_t apart;
  int64_t next;  // rows from one step to the next
  int64_t rest;  // the first row that no step takes
};

/// A block of channels over a range of rows.
struct Tile {
  int64_t channel_begin;
  int64_t channel_end;
  int64_t row_begin;
  int64_t row_end;

  int64_t channels() const { return channel_end - channel_begin; }
  int64_t rows() const { return row_end - row_begin; }
};

/// Puts whole packs of columns' values into the order of Pack::load_any_order.
template <typename T>
void to_any_order(Accumulate<T>* values, int64_t count) {
  using P = Pack<T>;
  if constexpr (P::place(1) != 1) {
    for (int64_t c = 0; c < count; c += P::kSize) {
      Accumulate<T> pack[P::kSize];
      for (int64_t i = 0; i < P::kSize; ++i) pack[P::place(i)] = values[c + i];
      std::copy_n(pack, P::kSize, values + c);
    }
  }
}

/// And back.
template <typename T>
void from_any_order(Accumulate<T>* values, int64_t count) {
  using P = Pack<T>;
  if constexpr (P::place(1) != 1) {
    for (int64_t c = 0; c < count; c += P::kSize) {
      Accumulate<T> pack[P::kSize];
      for (int64_t i = 0; i < P::kSize; ++i) pack[i] = values[c + P::place(i)];
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
    // Whole vectors: what a channel writes beyond its end, the next one overwrites, and the last one's end is padding.
    Accumulate<T>* of_channel = to;
    for (int64_t k = 0; k < channels; ++k, of_channel += inner) {
      const auto value = P::all(values[k]);
      for (int64_t i = 0; i < inner; i += P::kSize) value.store_wide(of_channel + i);
    }
  }
  std::fill_n(to + width, P::kSize, Accumulate<T>(0));
  to_any_order<T>(to, width);
}

/// totals[k] += the sum of channel k's columns
template <typename A>
void add_columns(const A* __restrict columns, int64_t channels, int64_t inner, double* __restrict totals) {
  if (inner == 1) {
    for (int64_t k = 0; k < channels; ++k) totals[k] += static_cast<double>(columns[k]);
    return;
  }
  constexpr int64_t kLanes = 8;
  for (int64_t k = 0; k < channels; ++k, columns += inner) {
    double lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= inner; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<double>(columns[i + lane]);
    }
    for (int64_t lane = 0; i + lane < inner; ++lane) lanes[lane] += static_cast<double>(columns[i + lane]);
    for (int64_t lane = 0; lane < kLanes; ++lane) totals[k] += lanes[lane];
  }
}

/// Sums of x - shift and of its square, of channels.
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
  /// For tiles of `values` of at most so many channels.
  TileTotals(const ColumnPlan& plan, const T* values, int64_t channels)
      : plan_(plan),
        values_(values),
        shift_(channels * plan.shape.inner, {values, 1}),
        first_(channels * plan.shape.inner, {values, 2}),
        second_(channels * plan.shape.inner, {values, 3}) {}

  /// shifts: of the tile's channels.
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
      empty(channels, totals);
    }
    if (order.rest == tile.rows()) return;
    clear(width);
    add_last_rows(x + order.rest * plan_.columns, width, tile.rows() - order.rest);
    empty(channels, totals);
  }

 private:
  void clear(int64_t width) {
    first_.clear(width + P::kSize);
    second_.clear(width + P::kSize);
  }

  void empty(int64_t channels, const Totals& totals) {
    from_any_order<T>(first_.get(), channels * plan_.shape.inner);
    from_any_order<T>(second_.get(), channels * plan_.shape.inner);
    add_columns(first_.get(), channels, plan_.shape.inner, totals.first);
    add_columns(second_.get(), channels, plan_.shape.inner, totals.second);
  }

  /// kRowsAtOnce, `apart` rows from one to the next.
  template <bool kFar>
  void add_rows(const T* x, int64_t apart, int64_t width) {
    const int64_t stride = apart * plan_.columns;
    // Neighbouring rows: those of the next step.
    const int64_t ahead = kFar ? plan_.ahead / kRowsAtOnce : kRowsAtOnce * plan_.columns;
    const auto add_pack = [&](int64_t c, const auto& load) {
      const P shift = P::load_wide(shift_.get() + c);
      // In pairs, for shorter chains.
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
    if (c < width) add_pack(c, [&](const T* from) { return P::load_any_order(from, width - c); });
  }

  /// Fewer than kRowsAtOnce.
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
  // Of columns.
  Scratch<A> shift_;
  Scratch<A> first_;
  Scratch<A> second_;
};

/// The shifts to begin with, of channels whose first row begins at x.
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
  for (int64_t i = 0; i < kSamples; ++i) rows[i] = x + count * i / kSamples * plan.columns;
  for (int64_t k = 0; k < channels; ++k) {
    shifts[k] = mean_of_samples<A>([&](int64_t i) { return static_cast<A>(rows[i][k]); });
  }
}

/// Moves shifts that lie far from the mean to it.
/// @return whether there were any: the totals must then be formed again
template <typename A>
bool move_far_shifts(const Totals& totals, int64_t channels, double count, A* shifts) {
  int64_t all_near = 1;
  for (int64_t k = 0; k < channels; ++k) {
    all_near &= static_cast<int64_t>(shift_is_near({totals.first[k], totals.second[k]}, count));
  }
  if (all_near) return false;
  bool any = false;
  for (int64_t k = 0; k < channels; ++k) {
    const Sums sums = {totals.first[k], totals.second[k]};
    const auto mean = static_cast<A>(moments_of(sums, shifts[k], count).mean);
    if (shift_is_near(sums, count) || !std::isfinite(mean)) continue;
    shifts[k] = mean;
    any = true;
  }
  return any;
}

/// Mean and m2 of channels from their totals; from x, their first value, where these overflow.
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
  if (all_fit) return;
  for (int64_t k = 0; k < channels; ++k) {
    if (std::isfinite(second[k])) continue;
    DoubleMoments moments;
    for (int64_t row = 0; row < plan.rows; ++row) {
      for (int64_t i = 0; i < plan.shape.inner; ++i) moments.add(x[row * plan.columns + k * plan.shape.inner + i]);
    }
    mean[k] = moments.get().mean;
    m2[k] = moments.get().m2;
  }
}

/// A coefficient of some channels, once for each of their columns.
template <typename T>
class PerColumn {
  using A = Accumulate<T>;

 public:
  PerColumn(const void* of_channels, const Tile& tile, int64_t inner, const Apart& apart)
      : values_(tile.channels() * inner, apart) {
    spread<T>(static_cast<const A*>(of_channels) + tile.channel_begin, tile.channels(), inner, values_.get());
  }
  Pack<T> at(int64_t column) const { return Pack<T>::load_wide(values_.get() + column); }

 private:
  Scratch<A> values_;
};

/// Normalises tiles of the same channels.
template <typename T, bool kResidual, bool kRelu, bool kStream>
class TileNormalizer {
  using P = Pack<T>;

 public:
  TileNormalizer(const ColumnPlan& plan, const ForwardArgs& args, const Tile& tile)
      : plan_(plan),
        args_(args),
        center_(args.center, tile, plan.shape.inner, {args.y, 1}),
        scale_(args.scale, tile, plan.shape.inner, {args.y, 2}),
        shift_(args.shift, tile, plan.shape.inner, {args.y, 3}) {}

  /// Backwards: a tile's last rows were read last.
  void run(const Tile& tile) const {
    const RowOrder order(plan_.far, tile.rows(), kRowsTogether);
    for (int64_t row = tile.rows() - 1; row >= order.rest; --row) run_rows<1, false>(tile, row, 1);
    for (int64_t step = order.steps - 1; step >= 0; --step) {
      const int64_t row = step * order.next;
      plan_.far ? run_rows<kRowsTogether, true>(tile, row, order.apart)
                : run_rows<kRowsTogether, false>(tile, row, order.apart);
    }
  }

 private:
  /// kRows of the tile from `row` on, `apart` rows from one to the next.
  template <int64_t kRows, bool kFar>
  void run_rows(const Tile& tile, int64_t row, int64_t apart) const {
    const int64_t stride = apart * plan_.columns;
    const int64_t ahead = plan_.ahead / kRows;
    const int64_t offset = (tile.row_begin + row) * plan_.columns + tile.channel_begin * plan_.shape.inner;
    const int64_t width = tile.channels() * plan_.shape.inner;
    const T* x = static_cast<const T*>(args_.x) + offset;
    const T* residual = kResidual ? static_cast<const T*>(args_.residual) + offset : nullptr;
    T* y = static_cast<T*>(args_.y) + offset;
    int64_t c = 0;
    for (; c + P::kSize <= width; c += P::kSize) {
      const P center = center_.at(c);
      const P scale = scale_.at(c);
      const P shift = shift_.at(c);
      // All reads before the writes: a row may lie a multiple of 4 KB from the next, and a read waits for a write to an
      // address with the same last 12 bits.
      P results[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t at = r * stride + c;
        if constexpr (kFar) {
          prefetch(x + at - ahead);
          if constexpr (kResidual) prefetch(residual + at - ahead);
        }
        results[r] =
            finish(P::load_any_order(x + at), kResidual ? P::load_any_order(residual + at) : P(), center, scale, shift);
      }
      for (int64_t r = 0; r < kRows; ++r) results[r].template store_any_order<kStream>(y + r * stride + c);
    }
    if (c == width) return;
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t at = r * stride + c;
      finish(P::load_any_order(x + at, width - c), kResidual ? P::load_any_order(residual + at, width - c) : P(),
             center_.at(c), scale_.at(c), shift_.at(c))
          .store_any_order(y + at, width - c);
    }
  }

  static P finish(const P& x, const P& residual, const P& center, const P& scale, const P& shift) {
    P result = normalized(x, center, scale, shift);
    if constexpr (kResidual) result = result + residual;
    if constexpr (kRelu) result = relu(result);
    return result;
  }

  const ColumnPlan& plan_;
  const ForwardArgs& args_;
  PerColumn<T> center_;
  PerColumn<T> scale_;
  PerColumn<T> shift_;
};

template <typename T, bool kResidual, bool kRelu, bool kStream>
class ColumnsForward {
  using A = Accumulate<T>;
  using Normalizer = TileNormalizer<T, kResidual, kRelu, kStream>;

 public:
  ColumnsForward(const ColumnPlan& plan, const ForwardArgs& args)
      : plan_(plan), args_(args), count_(static_cast<double>(plan.shape.values_per_channel())) {}

  /// mean and m2, nothing else.
  void statistics() const { plan_.blocks > 1 ? run_blocks(true, false) : statistics_of_segments(); }

  void run(bool with_statistics) const {
    if (plan_.blocks > 1) return run_blocks(with_statistics, true);
    if (with_statistics) statistics_of_segments();
    normalize_segments();
  }

 private:
  const T* x() const { return static_cast<const T*>(args_.x); }

  void run_blocks(bool with_statistics, bool normalizes) const {
    parallel(args_.parallel_for, plan_.blocks, plan_.shape.values(), [&](int64_t begin, int64_t end) {
      const int64_t channels = with_statistics ? plan_.channels_per_block : 0;
      TileTotals<T> tile_totals(plan_, x(), channels);
      const Scratch<A> shifts(channels);
      const Scratch<double> first(channels);
      const Scratch<double> second(channels);
      const Totals totals = {first.get(), second.get()};
      for (int64_t block = begin; block < end; ++block) {
        const Tile tile = {plan_.block_begin(block), plan_.block_end(block), 0, plan_.rows};
        if (with_statistics) {
          const T* of_tile = x() + tile.channel_begin * plan_.shape.inner;
          first_shifts(plan_, of_tile, tile.channels(), shifts.get());
          tile_totals.compute(tile, shifts.get(), totals);
          if (move_far_shifts(totals, tile.channels(), count_, shifts.get())) {
            tile_totals.compute(tile, shifts.get(), totals);
          }
          finish(tile, totals, shifts.get());
        }
        if (normalizes) Normalizer(plan_, args_, tile).run(tile);
      }
      if constexpr (kStream) streaming_done();
    });
  }

  void finish(const Tile& tile, const Totals& totals, const A* shifts) const {
    moments_of_channels(plan_, x() + tile.channel_begin * plan_.shape.inner, totals, shifts, tile.channels(),
                        args_.mean + tile.channel_begin, args_.m2 + tile.channel_begin);
    args_.blend(args_.blend_context, tile.channel_begin, tile.channel_end);
  }

  Tile tile_of_segment(int64_t segment) const {
    return {0, plan_.shape.channels, plan_.segment_begin(segment), plan_.segment_begin(segment + 1)};
  }

  void statistics_of_segments() const {
    const int64_t channels = plan_.shape.channels;
    const Scratch<A> shifts(channels);
    const Scratch<double> first(plan_.segments * channels);
    const Scratch<double> second(plan_.segments * channels);
    const Totals totals = {first.get(), second.get()};
    const int64_t parts = divide_up(channels, kChannelsTogether);
    const Scratch<bool> far(parts);
    first_shifts(plan_, x(), channels, shifts.get());
    add_segments(shifts.get(), totals);
    finish_parts(parts, [&](int64_t part, const Tile& tile) {
      add_up_segments(tile, totals);
      const Totals here = {totals.first + tile.channel_begin, totals.second + tile.channel_begin};
      far.get()[part] = move_far_shifts(here, tile.channels(), count_, shifts.get() + tile.channel_begin);
      if (!far.get()[part]) finish(tile, here, shifts.get() + tile.channel_begin);
    });
    if (std::none_of(far.get(), far.get() + parts, [](bool is_far) { return is_far; })) return;
    add_segments(shifts.get(), totals);
    finish_parts(parts, [&](int64_t part, const Tile& tile) {
      if (!far.get()[part]) return;
      add_up_segments(tile, totals);
      finish(tile, {totals.first + tile.channel_begin, totals.second + tile.channel_begin},
             shifts.get() + tile.channel_begin);
    });
  }

  /// run(part, tile of its channels)
  template <typename Run>
  void finish_parts(int64_t parts, const Run& run) const {
    // A channel costs about as much as a hundred values.
    parallel(args_.parallel_for, parts, plan_.shape.channels * 100, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t channel = part * kChannelsTogether;
        run(part, Tile{channel, std::min(channel + kChannelsTogether, plan_.shape.channels), 0, plan_.rows});
      }
    });
  }

  void add_segments(const A* shifts, const Totals& totals) const {
    const int64_t channels = plan_.shape.channels;
    parallel(args_.parallel_for, plan_.segments, plan_.shape.values(), [&](int64_t begin, int64_t end) {
      TileTotals<T> tile_totals(plan_, x(), channels);
      for (int64_t segment = begin; segment < end; ++segment) {
        tile_totals.compute(tile_of_segment(segment), shifts,
                            {totals.first + segment * channels, totals.second + segment * channels});
      }
    });
  }

  /// The first segment's totals take the others' in.
  void add_up_segments(const Tile& tile, const Totals& totals) const {
    for (int64_t segment = 1; segment < plan_.segments; ++segment) {
      const double* __restrict first = totals.first + segment * plan_.shape.channels;
      const double* __restrict second = totals.second + segment * plan_.shape.channels;
      for (int64_t k = tile.channel_begin; k < tile.channel_end; ++k) {
        totals.first[k] += first[k];
        totals.second[k] += second[k];
      }
    }
  }

  void normalize_segments() const {
    const Normalizer normalizer(plan_, args_, tile_of_segment(0));
    parallel(args_.parallel_for, plan_.segments, plan_.shape.values(), [&](int64_t begin, int64_t end) {
      for (int64_t segment = end - 1; segment >= begin; --segment) normalizer.run(tile_of_segment(segment));
      if constexpr (kStream) streaming_done();
    });
  }

  const ColumnPlan& plan_;
  const ForwardArgs& args_;
  double count_;
};

/// Whether all packs of all blocks of the rows from `to` on are aligned for streaming.
template <typename T>
bool can_stream_columns(const void* to, const ColumnPlan& plan) {
  const auto aligned = [](int64_t values) {
    return values * static_cast<int64_t>(sizeof(T)) % static_cast<int64_t>(sizeof(Bits)) == 0;
  };
  return can_stream_to(to) && aligned(plan.columns) && aligned(plan.channels_per_block * plan.shape.inner);
}

template <typename T>
void columns_forward(const ForwardArgs& args, bool with_statistics) {
  const ColumnPlan plan(args.shape, sizeof(T));
  const bool stream = args.stream && can_stream_columns<T>(args.y, plan);
  with_flags(args.residual != nullptr, args.relu, [&](auto residual, auto relu) {
    with_flag(stream, [&](auto streams) {
      ColumnsForward<T, residual(), relu(), streams() && kStreams<T>>(plan, args).run(with_statistics);
    });
  });
}

template <typename T>
void columns_statistics(const ForwardArgs& args) {
  const ColumnPlan plan(args.shape, sizeof(T));
  ColumnsForward<T, false, false, false>(plan, args).statistics();
}

/// Writes dx and dresidual of a tile and sums g and g * (x - center) of its channels.
template <typename T, bool kMask, bool kInput>
class TileBackward {
  using A = Accumulate<T>;
  using P = Pack<T>;

 public:
  TileBackward(const ColumnPlan& plan, const BackwardArgs& args, const Tile& tile)
      : plan_(plan),
        tile_(tile),
        pointers_(args),
        width_(tile.channels() * plan.shape.inner),
        scale_(args.scale, tile, plan.shape.inner, {args.dy, 0}),
        center_(args.center, tile, plan.shape.inner, {args.dy, 1}),
        g_(width_, {args.dy, 2}),
        gx_(width_, {args.dy, 3}) {
    pointers_.advance(tile.row_begin * plan.columns + tile.channel_begin * plan.shape.inner);
  }

  void run(double* sum_g, double* sum_gx) {
    std::fill_n(sum_g, tile_.channels(), 0.0);
    std::fill_n(sum_gx, tile_.channels(), 0.0);
    const RowOrder order(plan_.far, tile_.rows(), kRowsTogether);
    constexpr int64_t kSteps = kRowsPerChunk / kRowsTogether;
    for (int64_t step = 0; step < order.steps; step += kSteps) {
      clear();
      for (int64_t i = step; i < std::min(step + kSteps, order.steps); ++i) {
        plan_.far ? run_rows<kRowsTogether, true>(i * order.next, order.apart)
                  : run_rows<kRowsTogether, false>(i * order.next, order.apart);
      }
      empty(sum_g, sum_gx);
    }
    if (order.rest == tile_.rows()) return;
    clear();
    for (int64_t row = order.rest; row < tile_.rows(); ++row) run_rows<1, false>(row, 1);
    empty(sum_g, sum_gx);
  }

 private:
  void clear() {
    g_.clear(width_ + P::kSize);
    gx_.clear(width_ + P::kSize);
  }

  void empty(double* sum_g, double* sum_gx) {
    from_any_order<T>(g_.get(), width_);
    from_any_order<T>(gx_.get(), width_);
    add_columns(g_.get(), tile_.channels(), plan_.shape.inner, sum_g);
    add_columns(gx_.get(), tile_.channels(), plan_.shape.inner, sum_gx);
  }

  /// kRows of the tile from `row` on, `apart` rows from one to the next.
  template <int64_t kRows, bool kFar>
  void run_rows(int64_t row, int64_t apart) {
    BackwardPointers<T> p = pointers_;
    p.advance(row * plan_.columns);
    const int64_t stride = apart * plan_.columns;
    // dy and x; of neighbouring rows those of the next step.
    const int64_t ahead = kFar ? plan_.ahead / kRows / 2 : kRows * plan_.columns;
    int64_t c = 0;
    for (; c + P::kSize <= width_; c += P::kSize) {
      const P scale = scale_.at(c);
      const P center = center_.at(c);
      P sum_g = P::load_wide(g_.get() + c);
      P sum_gx = P::load_wide(gx_.get() + c);
      // All reads before the writes, as in TileNormalizer; and dx and dresidual may be dy.
      P g[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t at = r * stride + c;
        prefetch(p.dy + at + ahead);
        if constexpr (kInput) prefetch(p.x + at + ahead);
        if constexpr (kMask) prefetch(p.y + at + ahead);
        g[r] = P::load_any_order(p.dy + at);
        if constexpr (kMask) {
          g[r] = masked(P::load_any_order(p.y + at), g[r]);
        }
        if constexpr (kInput) {
          sum_gx = multiply_add(g[r], P::load_any_order(p.x + at) - center, sum_gx);
        }
        sum_g = sum_g + g[r];
      }
      if (p.dresidual) {
        for (int64_t r = 0; r < kRows; ++r) g[r].template store_any_order<false>(p.dresidual + r * stride + c);
      }
      if (p.dx) {
        for (int64_t r = 0; r < kRows; ++r) (g[r] * scale).template store_any_order<false>(p.dx + r * stride + c);
      }
      sum_g.store_wide(g_.get() + c);
      sum_gx.store_wide(gx_.get() + c);
    }
    if (c == width_) return;
    for (int64_t r = 0; r < kRows; ++r) run_tail(p, c, r * stride + c);
  }

  void run_tail(const BackwardPointers<T>& p, int64_t c, int64_t at) {
    const int64_t count = width_ - c;
    P g = P::load_any_order(p.dy + at, count);
    if constexpr (kMask) g = masked(P::load_any_order(p.y + at, count), g);
    (P::load_wide(g_.get() + c) + g).store_wide(g_.get() + c);
    if constexpr (kInput) {
      // Sums beyond the end are never used.
      multiply_add(g, P::load_any_order(p.x + at, count) - center_.at(c), P::load_wide(gx_.get() + c))
          .store_wide(gx_.get() + c);
    }
    if (p.dresidual) g.store_any_order(p.dresidual + at, count);
    if (p.dx) (g * scale_.at(c)).store_any_order(p.dx + at, count);
  }

  const ColumnPlan& plan_;
  Tile tile_;
  BackwardPointers<T> pointers_;
  int64_t width_;
  PerColumn<T> scale_;
  PerColumn<T> center_;
  Scratch<A> g_;
  Scratch<A> gx_;
};

template <typename T>
void columns_backward(const BackwardArgs& args) {
  const ColumnPlan plan(args.shape, sizeof(T));
  const int64_t channels = plan.shape.channels;
  // Of each segment of rows; where there is one, a block writes its channels' part of it.
  const Scratch<double> sum_g(plan.segments * channels);
  const Scratch<double> sum_gx(plan.segments * channels);
  const int64_t tasks = plan.blocks * plan.segments;  // one of the two is 1
  with_flags(args.y != nullptr, args.x != nullptr, [&](auto mask, auto input) {
    parallel(args.parallel_for, tasks, plan.shape.values(), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = plan.blocks > 1 ? task : 0;
        const int64_t segment = plan.blocks > 1 ? 0 : task;
        const Tile tile = {plan.block_begin(block), plan.block_end(block), plan.segment_begin(segment),
                           plan.segment_begin(segment + 1)};
        const int64_t first = segment * channels + tile.channel_begin;
        TileBackward<T, mask(), input()>(plan, args, tile).run(sum_g.get() + first, sum_gx.get() + first);
      }
    });
  });
  std::fill_n(args.sum_g, channels, 0.0);
  std::fill_n(args.sum_gx, channels, 0.0);
  for (int64_t segment = 0; segment < plan.segments; ++segment) {
    for (int64_t c = 0; c < channels; ++c) {
      args.sum_g[c] += sum_g.get()[segment * channels + c];
      args.sum_gx[c] += sum_gx.get()[segment * channels + c];
    }
  }
}

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
