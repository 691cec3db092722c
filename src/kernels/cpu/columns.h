#pragma once

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/moments.h"
#include "kernels/cpu/normalize_run.h"
#include "kernels/cpu/parallel.h"

#include <cstring>
#include <memory>
#include <new>

// [outer][channels][inner] with short planes or none: rows of channels * inner columns, each column part of one
// channel. Where a block of columns fits the cache over all rows, blocks are tasks and a block's second read comes from
// the cache. Otherwise segments of rows are tasks; their number depends on the shape alone and they are merged in
// order: the same bits for any number of threads.

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// Rows that are added up in registers before their sums go to the accumulators.
constexpr int64_t kRowsAtOnce = 8;
/// Rows after which the accumulators are emptied into double: few enough for their rounding.
constexpr int64_t kRowsPerChunk = 32;
/// A block of columns may take this many bytes over all rows, to be read again from the cache.
constexpr int64_t kBlockBytes = 256 * 1024;
/// A block is at least this wide (below, rows waste cache lines) and at most this (its accumulators stay near).
constexpr int64_t kNarrowestBlock = 64;
constexpr int64_t kWidestBlock = 1024;
/// A segment of rows is worth this many values.
constexpr int64_t kSegmentValues = 256 * 1024;
constexpr int64_t kMostSegments = 64;
/// How far ahead of a row's values memory is asked for.
constexpr int64_t kAheadBytes = 16 * 1024;

/// Uninitialised memory whose tail may be read as full vectors.
template <typename V>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : values_(static_cast<V*>(::operator new(static_cast<size_t>(size + kPadding) * sizeof(V)))) {}
  ~Scratch() { ::operator delete(values_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  V* get() const { return values_; }

 private:
  V* values_;
};

struct ColumnPlan {
  explicit ColumnPlan(const Shape& s, int64_t element_size)
      : shape(s), rows(s.outer), columns(s.channels * s.inner), channels_per_block(s.channels), segments(1) {
    const int64_t cached = std::min(kBlockBytes / (rows * element_size), kWidestBlock);
    const int64_t narrowest = divide_up(kNarrowestBlock, s.inner);
    channels_per_block = std::max(cached / s.inner, narrowest);
    if (s.inner == 1) channels_per_block = divide_up(channels_per_block, kNarrowestBlock) * kNarrowestBlock;
    channels_per_block = std::min(channels_per_block, s.channels);
    blocks = divide_up(s.channels, channels_per_block);
    const bool fits = rows * channels_per_block * s.inner * element_size <= 4 * kBlockBytes;
    const bool enough = blocks >= 4 || s.values() <= kSegmentValues / 4;
    if (fits && enough) return;
    blocks = 1;
    channels_per_block = s.channels;
    segments = std::min(
        {kMostSegments, std::max<int64_t>(1, s.values() / kSegmentValues) * 2, divide_up(rows, kRowsPerChunk)});
  }

  int64_t segment_begin(int64_t segment) const { return rows * segment / segments; }
  int64_t block_begin(int64_t block) const { return block * channels_per_block; }
  int64_t block_end(int64_t block) const { return std::min(shape.channels, (block + 1) * channels_per_block); }
  bool by_segments() const { return segments > 1; }

  Shape shape;
  int64_t rows;
  int64_t columns;  // of a row, which is also its stride
  int64_t channels_per_block;
  int64_t blocks;
  int64_t segments;
};

/// Mean and m2 of each of `width` columns over `rows` rows.
template <typename T>
class ColumnMoments {
  using A = Accumulate<T>;
  using P = Pack<T>;

 public:
  ColumnMoments(int64_t width, double* mean, double* m2)
      : width_(width), mean_(mean), m2_(m2), shift_(width), first_(width), second_(width) {}

  void compute(const T* x, int64_t rows, int64_t stride) {
    std::memset(mean_, 0, static_cast<size_t>(width_) * sizeof(double));
    std::memset(m2_, 0, static_cast<size_t>(width_) * sizeof(double));
    start_at_mean_of(x, std::min(rows, kRowsAtOnce), stride);
    for (int64_t row = 0; row < rows; row += kRowsPerChunk) {
      const int64_t count = std::min(kRowsPerChunk, rows - row);
      clear();
      add_rows(x + row * stride, count, stride);
      merge_chunk(x + row * stride, static_cast<double>(row), count, stride);
    }
  }

 private:
  void clear() {
    std::memset(first_.get(), 0, static_cast<size_t>(width_) * sizeof(A));
    std::memset(second_.get(), 0, static_cast<size_t>(width_) * sizeof(A));
  }

  void start_at_mean_of(const T* x, int64_t rows, int64_t stride) {
    std::memset(shift_.get(), 0, static_cast<size_t>(width_) * sizeof(A));
    clear();
    add_rows(x, rows, stride);
    for (int64_t c = 0; c < width_; ++c) {
      const A mean = first_.get()[c] / static_cast<A>(rows);
      shift_.get()[c] = std::isfinite(mean) ? mean : 0;
    }
  }

  void add_rows(const T* x, int64_t rows, int64_t stride) {
    int64_t row = 0;
    for (; row + kRowsAtOnce <= rows; row += kRowsAtOnce) add_some_rows(x + row * stride, kRowsAtOnce, stride);
    if (row < rows) add_some_rows(x + row * stride, rows - row, stride);
  }

  void add_some_rows(const T* x, int64_t rows, int64_t stride) {
    int64_t c = 0;
    for (; c + P::kSize <= width_; c += P::kSize) {
      add_pack(c, rows, [&](int64_t row) {
        const T* from = x + row * stride + c;
        __builtin_prefetch(reinterpret_cast<const char*>(from) + kAheadBytes);
        return P::load(from);
      });
    }
    if (c < width_) add_pack(c, rows, [&](int64_t row) { return P::load(x + row * stride + c, width_ - c); });
  }

  template <typename Load>
  void add_pack(int64_t c, int64_t rows, const Load& load) {
    const P shift = P::load_wide(shift_.get() + c);
    P first = P::load_wide(first_.get() + c);
    P second = P::load_wide(second_.get() + c);
    if (rows == kRowsAtOnce) {
      P d[kRowsAtOnce];
      for (int64_t row = 0; row < kRowsAtOnce; ++row) d[row] = load(row) - shift;
      first = first + (((d[0] + d[1]) + (d[2] + d[3])) + ((d[4] + d[5]) + (d[6] + d[7])));
      P low = d[0] * d[0];
      P high = d[4] * d[4];
      for (int row = 1; row < 4; ++row) {
        low = multiply_add(d[row], d[row], low);
        high = multiply_add(d[row + 4], d[row + 4], high);
      }
      second = second + (low + high);
    } else {
      for (int64_t row = 0; row < rows; ++row) {
        const P d = load(row) - shift;
        first = first + d;
        second = multiply_add(d, d, second);
      }
    }
    first.store_wide(first_.get() + c);
    second.store_wide(second_.get() + c);
  }

  /// Merges the accumulators, of `count` rows from x on, into mean and m2, of `before` rows; the next shift is the new
  /// mean.
  void merge_chunk(const T* x, double before, int64_t count, int64_t stride) {
    const double n = static_cast<double>(count);
    const double share = n / (before + n);
    double* __restrict mean = mean_;
    double* __restrict m2 = m2_;
    A* __restrict shift = shift_.get();
    const A* __restrict first = first_.get();
    const A* __restrict second = second_.get();
    int overflow = 0;
    for (int64_t c = 0; c < width_; ++c) overflow |= !(second[c] <= std::numeric_limits<A>::max());
    if (overflow) return merge_chunk_in_double(x, before, count, stride);
    for (int64_t c = 0; c < width_; ++c) {
      const double sum = static_cast<double>(first[c]);
      const double chunk_mean = static_cast<double>(shift[c]) + sum / n;
      const double chunk_m2 = static_cast<double>(second[c]) - sum * (sum / n);
      const double delta = chunk_mean - mean[c];
      mean[c] += delta * share;
      m2[c] += (chunk_m2 > 0 ? chunk_m2 : 0) + delta * delta * (before * share);
      shift[c] = static_cast<A>(mean[c]);
    }
  }

  /// For magnitudes whose squares the accumulate type does not hold.
  void merge_chunk_in_double(const T* x, double before, int64_t count, int64_t stride) {
    const Scratch<A> column(count);
    const Scratch<T> values(count);
    for (int64_t c = 0; c < width_; ++c) {
      for (int64_t row = 0; row < count; ++row) values.get()[row] = x[row * stride + c];
      Moments into = {before, mean_[c], m2_[c]};
      merge(into, moments_in_double(values.get(), count));
      mean_[c] = into.mean;
      m2_[c] = into.m2;
      const A mean = static_cast<A>(into.mean);
      shift_.get()[c] = std::isfinite(mean) ? mean : 0;
    }
  }

  int64_t width_;
  double* mean_;
  double* m2_;
  Scratch<A> shift_;
  Scratch<A> first_;
  Scratch<A> second_;
};

/// Columns' moments, all over `rows` rows, into their channels': channel c has the `inner` columns from (c - begin) *
/// inner on.
inline void columns_to_channels(const double* mean, const double* m2, int64_t rows, int64_t inner, int64_t begin,
                                int64_t end, double* channel_mean, double* channel_m2) {
  const double n = static_cast<double>(rows);
  for (int64_t channel = begin; channel < end; ++channel) {
    const double* means = mean + (channel - begin) * inner;
    const double* m2s = m2 + (channel - begin) * inner;
    // Around the first, so that a large common mean costs nothing.
    double sum = 0;
    for (int64_t i = 0; i < inner; ++i) sum += means[i] - means[0];
    const double of_all = means[0] + sum / static_cast<double>(inner);
    double total = 0;
    for (int64_t i = 0; i < inner; ++i) total += m2s[i] + n * (means[i] - of_all) * (means[i] - of_all);
    channel_mean[channel] = of_all;
    channel_m2[channel] = total;
  }
}

/// A coefficient of channels [begin, end), once for each of their columns.
template <typename A>
class PerColumn {
 public:
  PerColumn(const void* of_channels, int64_t begin, int64_t end, int64_t inner)
      : expanded_(inner == 1 ? 0 : (end - begin) * inner), values_(static_cast<const A*>(of_channels) + begin) {
    if (inner == 1) return;
    A* to = expanded_.get();
    for (int64_t channel = begin; channel < end; ++channel) {
      for (int64_t i = 0; i < inner; ++i) *to++ = static_cast<const A*>(of_channels)[channel];
    }
    values_ = expanded_.get();
  }
  const A* get() const { return values_; }

 private:
  Scratch<A> expanded_;
  const A* values_;
};

/// A block of columns over a range of rows.
struct Tile {
  int64_t channel_begin;
  int64_t channel_end;
  int64_t row_begin;
  int64_t row_end;
};

template <typename T>
class TileNormalizer {
  using A = Accumulate<T>;
  using Source = EachColumn<T>;

 public:
  TileNormalizer(const ForwardArgs& args, int64_t channel_begin, int64_t channel_end)
      : args_(args),
        center_(args.center, channel_begin, channel_end, args.shape.inner),
        scale_(args.scale, channel_begin, channel_end, args.shape.inner),
        shift_(args.shift, channel_begin, channel_end, args.shape.inner) {}

  /// Rows backwards: the statistics pass left the last ones in the cache.
  void run(const Tile& tile) const {
    with_flags(args_.residual != nullptr, args_.relu, [&](auto residual, auto relu) {
      const int64_t stride = args_.shape.channels * args_.shape.inner;
      const int64_t width = (tile.channel_end - tile.channel_begin) * args_.shape.inner;
      const Coefficients<Source> coefficients = {Source{center_.get()}, Source{scale_.get()}, Source{shift_.get()}};
      for (int64_t row = tile.row_end - 1; row >= tile.row_begin; --row) {
        const int64_t offset = row * stride + tile.channel_begin * args_.shape.inner;
        const T* x = static_cast<const T*>(args_.x) + offset;
        const T* added = residual() ? static_cast<const T*>(args_.residual) + offset : nullptr;
        normalize_run<T, residual(), relu()>(x, added, static_cast<T*>(args_.y) + offset, width, coefficients,
                                             x - kAheadBytes / static_cast<int64_t>(sizeof(T)));
      }
    });
  }

 private:
  const ForwardArgs& args_;
  PerColumn<A> center_;
  PerColumn<A> scale_;
  PerColumn<A> shift_;
};

template <typename T>
void forward_by_blocks(const ColumnPlan& plan, const ForwardArgs& args, bool with_statistics) {
  const int64_t inner = plan.shape.inner;
  parallel(args.parallel_for, plan.blocks, plan.shape.values(), [&](int64_t begin, int64_t end) {
    const int64_t widest = plan.channels_per_block * inner;
    const Scratch<double> mean(widest);
    const Scratch<double> m2(widest);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = plan.block_begin(block);
      const int64_t last = plan.block_end(block);
      if (with_statistics) {
        ColumnMoments<T> moments((last - first) * inner, mean.get(), m2.get());
        moments.compute(static_cast<const T*>(args.x) + first * inner, plan.rows, plan.columns);
        columns_to_channels(mean.get(), m2.get(), plan.rows, inner, first, last, args.mean, args.m2);
        args.blend(args.blend_context, first, last);
      }
      TileNormalizer<T>(args, first, last).run({first, last, 0, plan.rows});
    }
  });
}

/// Mean and m2 of all columns, from those of each segment of rows.
inline void merge_segments(const ColumnPlan& plan, double* mean, double* m2) {
  double rows = static_cast<double>(plan.segment_begin(1));
  for (int64_t segment = 1; segment < plan.segments; ++segment) {
    const double more = static_cast<double>(plan.segment_begin(segment + 1) - plan.segment_begin(segment));
    const double share = more / (rows + more);
    const double* __restrict other_mean = mean + segment * plan.columns;
    const double* __restrict other_m2 = m2 + segment * plan.columns;
    for (int64_t c = 0; c < plan.columns; ++c) {
      const double delta = other_mean[c] - mean[c];
      mean[c] += delta * share;
      m2[c] += other_m2[c] + delta * delta * (rows * share);
    }
    rows += more;
  }
}

template <typename T>
void forward_by_segments(const ColumnPlan& plan, const ForwardArgs& args, bool with_statistics) {
  const int64_t channels = plan.shape.channels;
  if (with_statistics) {
    const Scratch<double> mean(plan.segments * plan.columns);
    const Scratch<double> m2(plan.segments * plan.columns);
    parallel(args.parallel_for, plan.segments, plan.shape.values(), [&](int64_t begin, int64_t end) {
      for (int64_t segment = begin; segment < end; ++segment) {
        const int64_t row = plan.segment_begin(segment);
        ColumnMoments<T> moments(plan.columns, mean.get() + segment * plan.columns, m2.get() + segment * plan.columns);
        moments.compute(static_cast<const T*>(args.x) + row * plan.columns, plan.segment_begin(segment + 1) - row,
                        plan.columns);
      }
    });
    merge_segments(plan, mean.get(), m2.get());
    columns_to_channels(mean.get(), m2.get(), plan.rows, plan.shape.inner, 0, channels, args.mean, args.m2);
    args.blend(args.blend_context, 0, channels);
  }
  const TileNormalizer<T> normalizer(args, 0, channels);
  parallel(args.parallel_for, plan.segments, plan.shape.values(), [&](int64_t begin, int64_t end) {
    for (int64_t segment = end - 1; segment >= begin; --segment) {
      normalizer.run({0, channels, plan.segment_begin(segment), plan.segment_begin(segment + 1)});
    }
  });
}

template <typename T>
void columns_forward(const ForwardArgs& args, bool with_statistics) {
  const ColumnPlan plan(args.shape, sizeof(T));
  plan.by_segments() ? forward_by_segments<T>(plan, args, with_statistics)
                     : forward_by_blocks<T>(plan, args, with_statistics);
}

/// Sums of g and g * (x - center) of one tile's columns, in double.
template <typename T>
void backward_tile(const ColumnPlan& plan, const BackwardArgs& args, const Tile& tile, double* sum_g, double* sum_gx) {
  using A = Accumulate<T>;
  using P = Pack<T>;
  const int64_t inner = plan.shape.inner;
  const int64_t width = (tile.channel_end - tile.channel_begin) * inner;
  const PerColumn<A> scale(args.scale, tile.channel_begin, tile.channel_end, inner);
  const PerColumn<A> center(args.center, tile.channel_begin, tile.channel_end, inner);
  const Scratch<A> g(width);
  const Scratch<A> gx(width);
  const BackwardRun<T> all = {static_cast<const T*>(args.dy), static_cast<const T*>(args.x),
                              static_cast<const T*>(args.y), static_cast<T*>(args.dx), static_cast<T*>(args.dresidual)};
  std::memset(sum_g, 0, static_cast<size_t>(width) * sizeof(double));
  std::memset(sum_gx, 0, static_cast<size_t>(width) * sizeof(double));
  for (int64_t chunk = tile.row_begin; chunk < tile.row_end; chunk += kRowsPerChunk) {
    std::memset(g.get(), 0, static_cast<size_t>(width) * sizeof(A));
    std::memset(gx.get(), 0, static_cast<size_t>(width) * sizeof(A));
    for (int64_t row = chunk; row < std::min(chunk + kRowsPerChunk, tile.row_end); ++row) {
      backward_run(all.from(row * plan.columns + tile.channel_begin * inner), width, EachColumn<T>{scale.get()},
                   EachColumn<T>{center.get()}, [&](int, int64_t i, const P& g_here, const P& gx_here) {
                     (P::load_wide(g.get() + i) + g_here).store_wide(g.get() + i);
                     (P::load_wide(gx.get() + i) + gx_here).store_wide(gx.get() + i);
                   });
    }
    for (int64_t c = 0; c < width; ++c) {
      sum_g[c] += static_cast<double>(g.get()[c]);
      sum_gx[c] += static_cast<double>(gx.get()[c]);
    }
  }
}

/// The sums of channels [begin, end) from those of their columns, which lie `stride` apart for each of `parts` parts.
inline void add_up_columns(const ColumnPlan& plan, const BackwardArgs& args, int64_t begin, int64_t end, int64_t parts,
                           const double* sum_g, const double* sum_gx) {
  const int64_t inner = plan.shape.inner;
  const int64_t width = (end - begin) * inner;
  for (int64_t channel = begin; channel < end; ++channel) {
    double g = 0;
    double gx = 0;
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t i = 0; i < inner; ++i) {
        const int64_t at = part * width + (channel - begin) * inner + i;
        g += sum_g[at];
        gx += sum_gx[at];
      }
    }
    args.sum_g[channel] = g;
    args.sum_gx[channel] = gx;
  }
}

template <typename T>
void columns_backward(const BackwardArgs& args) {
  const ColumnPlan plan(args.shape, sizeof(T));
  const int64_t channels = plan.shape.channels;
  const int64_t width = plan.channels_per_block * plan.shape.inner;
  const int64_t parts = plan.blocks * plan.segments;  // one of the two is 1
  const Scratch<double> sum_g(parts * width);
  const Scratch<double> sum_gx(parts * width);
  parallel(args.parallel_for, parts, plan.shape.values(), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t block = plan.by_segments() ? 0 : part;
      const int64_t segment = plan.by_segments() ? part : 0;
      const Tile tile = {plan.block_begin(block), plan.block_end(block), plan.segment_begin(segment),
                         plan.segment_begin(segment + 1)};
      backward_tile<T>(plan, args, tile, sum_g.get() + part * width, sum_gx.get() + part * width);
      if (!plan.by_segments()) {
        add_up_columns(plan, args, tile.channel_begin, tile.channel_end, 1, sum_g.get() + part * width,
                       sum_gx.get() + part * width);
      }
    }
  });
  if (plan.by_segments()) add_up_columns(plan, args, 0, channels, plan.segments, sum_g.get(), sum_gx.get());
}

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
