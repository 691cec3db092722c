#pragma once

#include "kernels/cpu/backward_run.h"
#include "kernels/cpu/columns/per_column.h"
#include "kernels/cpu/columns/plan.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/simd/scratch.h"

#include <optional>

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// Loads `count` values of everything that is read, fewer than a pack.
template <typename T, Mask kMask, bool kInput>
MOMENTUM_BN_INLINE BackwardPacks<T, kMask, kInput> load_any_order(const BackwardPointers<T>& p, int64_t at,
                                                                  int64_t count) {
  using P = Pack<T>;
  BackwardPacks<T, kMask, kInput> packs;
  packs.dy = P::load_any_order(p.dy + at, count);
  if constexpr (kInput) {
    packs.x = P::load_any_order(p.x + at, count);
  }
  if constexpr (kMask == Mask::kFromY) {
    packs.y = P::load_any_order(p.y + at, count);
  }
  return packs;
}

/// Holds the coefficients of the ReLU's mask, where it is made from x.
template <typename T, Mask kMask>
class MaskPerColumn {
  using A = Accumulate<T>;

 public:
  MaskPerColumn(const Channels<A>& channels, const Tile& tile, int64_t inner, const Apart& apart) {
    if constexpr (kMask == Mask::kFromX) {
      forward_.emplace(channels, tile.channel_begin, tile.channel_end, inner, apart);
    }
  }

  MOMENTUM_BN_INLINE PackCoefficients<T> at(int64_t column) const {
    if constexpr (kMask == Mask::kFromX) {
      return forward_->at(column);
    }
    return {};
  }

 private:
  std::optional<ForwardPerColumn<T>> forward_;
};

/// Sums g and g * (x - center) of a tile's channels, and writes dresidual and the dx of constant statistics where they
/// are asked for.
template <typename T, Mask kMask, bool kInput>
class TileSums {
  using A = Accumulate<T>;
  using P = Pack<T>;
  using Packs = BackwardPacks<T, kMask, kInput>;

 public:
  TileSums(const ColumnPlan& plan, const BackwardArgs& args, const Tile& tile)
      : plan_(plan),
        tile_(tile),
        pointers_(args),
        width_(tile.channels() * plan.shape.inner),
        scale_(width_, {args.dy, 1}),
        center_(width_, {args.dy, 2}),
        sums_(width_, {args.dy, 4}),
        mask_(Channels<A>(args), tile, plan.shape.inner, {args.dy, 3}) {
    const Channels<A> channels(args);
    pointers_.advance(tile.row_begin * plan.columns + tile.channel_begin * plan.shape.inner);
    center_.set(channels.saved + tile.channel_begin, tile.channels(), plan.shape.inner);
    const Scratch<A> scale(tile.channels());
    for (int64_t k = 0; k < tile.channels(); ++k) {
      const int64_t c = tile.channel_begin + k;
      scale.get()[k] = static_cast<A>(channels.weight_of(c) * static_cast<double>(channels.statistics(c).rstd));
    }
    scale_.set(scale.get(), tile.channels(), plan.shape.inner);
  }

  void run(double* sum_g, double* sum_gx) {
    sums_.begin(width_);
    const int64_t rest = plan_.far ? run_all<kRowsTogether, true>(0) : run_all<kRowsTogether, false>(0);
    run_all<1, false>(rest);
    sums_.end(tile_.channels(), plan_.shape.inner, sum_g, sum_gx);
  }

 private:
  /// Gradients of float are few, as no other error is as large as that of their sum; those of 16 bits are themselves
  /// less exact.
  static constexpr int64_t kMostRows = std::is_same_v<T, float> ? 16 : 64;

  /// Takes rows of the tile from `begin` on, kRows at a time.
  /// @return the first row that is left
  template <int64_t kRows, bool kFar>
  int64_t run_all(int64_t begin) {
    const RowOrder order(kFar, tile_.rows() - begin, kRows);
    for (int64_t i = 0; i < order.steps; ++i) {
      run_rows<kRows, kFar>(begin + i * order.next, order.apart);
    }
    return begin + order.rest;
  }

  /// Takes kRows of the tile from `row` on, with `apart` rows from one to the next.
  template <int64_t kRows, bool kFar>
  void run_rows(int64_t row, int64_t apart) {
    BackwardPointers<T> p = pointers_;
    p.advance(row * plan_.columns);
    const int64_t stride = apart * plan_.columns;
    // Both dy and x are asked for; where rows are neighbours, those of the next step.
    const int64_t ahead = kFar ? plan_.ahead / kRows / 2 : kRows * plan_.columns;
    sums_.next_rows(kRows);
    int64_t c = 0;
    for (; c + P::kSize <= width_; c += P::kSize) {
      const P scale = scale_.at(c);
      const P center = center_.at(c);
      const auto mask = mask_.at(c);
      // The terms of these rows are added up first: long chains have large errors.
      P sum_g;
      P sum_gx;
      // All reads come before the writes, as in TileNormalizer, and because dx may be dy.
      P g[kRows];
#pragma GCC unroll 4
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t at = r * stride + c;
        prefetch(p.dy + at + ahead);
        if constexpr (kInput) {
          prefetch(p.x + at + ahead);
        }
        if constexpr (kMask == Mask::kFromY) {
          prefetch(p.y + at + ahead);
        }
        const auto packs = Packs::load(p, at);
        g[r] = packs.g(mask);
        if constexpr (kInput) {
          const P d = packs.x - center;
          sum_gx = r == 0 ? g[r] * d : multiply_add(g[r], d, sum_gx);
        }
        sum_g = r == 0 ? g[r] : sum_g + g[r];
      }
      if (p.dresidual) {
#pragma GCC unroll 4
        for (int64_t r = 0; r < kRows; ++r) {
          g[r].template store_any_order<false>(p.dresidual + r * stride + c);
        }
      }
      if (p.dx) {
#pragma GCC unroll 4
        for (int64_t r = 0; r < kRows; ++r) {
          (g[r] * scale).template store_any_order<false>(p.dx + r * stride + c);
        }
      }
      sums_.add_first(c, sum_g);
      if constexpr (kInput) {
        sums_.add_second(c, sum_gx);
      }
    }
    for (int64_t r = 0; c < width_ && r < kRows; ++r) {
      run_tail(p, c, r * stride + c);
    }
  }

  void run_tail(const BackwardPointers<T>& p, int64_t c, int64_t at) {
    const int64_t count = width_ - c;
    const auto packs = load_any_order<T, kMask, kInput>(p, at, count);
    const P g = packs.g(mask_.at(c));
    // Sums beyond the end are never used.
    sums_.add_first(c, g);
    if constexpr (kInput) {
      sums_.add_second(c, g * (packs.x - center_.at(c)));
    }
    if (p.dresidual) {
      g.store_any_order(p.dresidual + at, count);
    }
    if (p.dx) {
      (g * scale_.at(c)).store_any_order(p.dx + at, count);
    }
  }

  const ColumnPlan& plan_;
  Tile tile_;
  BackwardPointers<T> pointers_;
  int64_t width_;
  PerColumn<T> scale_;
  PerColumn<T> center_;
  SumsPerColumn<T, kMostRows> sums_;
  MaskPerColumn<T, kMask> mask_;
};

/// Writes dx of tiles of the same channels, through the statistics.
template <typename T, Mask kMask>
class TileInputGradient {
  using A = Accumulate<T>;
  using P = Pack<T>;
  using Packs = BackwardPacks<T, kMask, true>;

 public:
  /// @param sum_g, sum_gx  arrays of all channels
  TileInputGradient(const ColumnPlan& plan, const BackwardArgs& args, const Tile& tile, const double* sum_g,
                    const double* sum_gx)
      : plan_(plan),
        pointers_(args),
        width_(tile.channels() * plan.shape.inner),
        center_(width_, {args.dx, 1}),
        scale_(width_, {args.dx, 2}),
        offset_(width_, {args.dx, 3}),
        deviation_scale_(width_, {args.dx, 4}),
        rest_(width_, {args.dx, 5}),
        mask_(Channels<A>(args), tile, plan.shape.inner, {args.dx, 6}) {
    const Channels<A> channels(args);
    const Scratch<A> scale(tile.channels());
    const Scratch<A> offset(tile.channels());
    const Scratch<A> deviation_scale(tile.channels());
    const Scratch<A> rest(tile.channels());
    SharesInOrder<A> shares(channels);
    for (int64_t k = 0; k < tile.channels(); ++k) {
      const int64_t c = tile.channel_begin + k;
      const auto of_channel = input_gradient_coefficients(channels.statistics(c), shares.of(c), channels.weight_of(c),
                                                          {sum_g[c], sum_gx[c]});
      scale.get()[k] = of_channel.scale;
      offset.get()[k] = of_channel.offset;
      deviation_scale.get()[k] = of_channel.deviation_scale;
      rest.get()[k] = of_channel.rest;
    }
    center_.set(channels.saved + tile.channel_begin, tile.channels(), plan.shape.inner);
    scale_.set(scale.get(), tile.channels(), plan.shape.inner);
    offset_.set(offset.get(), tile.channels(), plan.shape.inner);
    deviation_scale_.set(deviation_scale.get(), tile.channels(), plan.shape.inner);
    rest_.set(rest.get(), tile.channels(), plan.shape.inner);
  }

  /// Goes backwards, as a tile's last rows were read last.
  void run(const Tile& tile) const {
    BackwardPointers<T> p = pointers_;
    p.advance(tile.row_begin * plan_.columns + tile.channel_begin * plan_.shape.inner);
    const RowOrder order(plan_.far, tile.rows(), kRowsTogether);
    for (int64_t row = tile.rows() - 1; row >= order.rest; --row) {
      run_rows<1, false>(p, row, 1);
    }
    for (int64_t step = order.steps - 1; step >= 0; --step) {
      const int64_t row = step * order.next;
      plan_.far ? run_rows<kRowsTogether, true>(p, row, order.apart)
                : run_rows<kRowsTogether, false>(p, row, order.apart);
    }
  }

 private:
  /// Takes kRows of the tile from `row` on, with `apart` rows from one to the next.
  template <int64_t kRows, bool kFar>
  void run_rows(BackwardPointers<T> p, int64_t row, int64_t apart) const {
    p.advance(row * plan_.columns);
    const int64_t stride = apart * plan_.columns;
    const int64_t ahead = plan_.ahead / kRows / 2;
    int64_t c = 0;
    for (; c + P::kSize <= width_; c += P::kSize) {
      const auto center = center_.at(c);
      const auto scale = scale_.at(c);
      const auto offset = offset_.at(c);
      const auto deviation_scale = deviation_scale_.at(c);
      const auto rest = rest_.at(c);
      const auto mask = mask_.at(c);
      // All reads come before the writes, as in TileNormalizer.
      P dx[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t at = r * stride + c;
        if constexpr (kFar) {
          prefetch(p.dy + at - ahead);
          prefetch(p.x + at - ahead);
          if constexpr (kMask == Mask::kFromY) {
            prefetch(p.y + at - ahead);
          }
        }
        const auto packs = Packs::load(p, at);
        dx[r] = input_gradient(packs.g(mask), packs.x - center, scale, offset, deviation_scale, rest);
      }
      for (int64_t r = 0; r < kRows; ++r) {
        dx[r].template store_any_order<false>(p.dx + r * stride + c);
      }
    }
    if (c == width_) {
      return;
    }
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t at = r * stride + c;
      const auto packs = load_any_order<T, kMask, true>(p, at, width_ - c);
      input_gradient(packs.g(mask_.at(c)), packs.x - center_.at(c), scale_.at(c), offset_.at(c), deviation_scale_.at(c),
                     rest_.at(c))
          .store_any_order(p.dx + at, width_ - c);
    }
  }

  const ColumnPlan& plan_;
  BackwardPointers<T> pointers_;
  int64_t width_;
  PerColumn<T> center_;
  PerColumn<T> scale_;
  PerColumn<T> offset_;
  PerColumn<T> deviation_scale_;
  PerColumn<T> rest_;
  MaskPerColumn<T, kMask> mask_;
};

/// Holds the sums of all channels, over each segment of rows and then over all of them.
template <typename A>
class ColumnSums {
 public:
  explicit ColumnSums(const ColumnPlan& plan)
      : plan_(plan), g_(plan.segments * plan.shape.channels), gx_(plan.segments * plan.shape.channels) {}

  /// The sums over a segment, from this channel on.
  double* g(int64_t segment, int64_t channel) const { return g_.get() + segment * plan_.shape.channels + channel; }
  double* gx(int64_t segment, int64_t channel) const { return gx_.get() + segment * plan_.shape.channels + channel; }

  /// Must be called when all segments of these channels are summed up. The first segment's sums take in the others', in
  /// order.
  void finish(const BackwardArgs& args, int64_t channel_begin, int64_t channel_end) const {
    for (int64_t segment = 1; segment < plan_.segments; ++segment) {
      add(g(0, 0), g(segment, 0), channel_begin, channel_end);
      add(gx(0, 0), gx(segment, 0), channel_begin, channel_end);
    }
    const Channels<A> channels(args);
    for (int64_t c = channel_begin; c < channel_end; ++c) {
      const auto sums = finish_sums(args, channels, c, {*g(0, c), *gx(0, c)});
      *g(0, c) = sums.g;
      *gx(0, c) = sums.gx;
    }
  }

 private:
  static void add(double* __restrict to, const double* __restrict from, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      to[c] += from[c];
    }
  }

  const ColumnPlan& plan_;
  Scratch<double> g_;
  Scratch<double> gx_;
};

/// Forms the sums, and where a tile is a block calls on_block(tile) when its sums are there.
template <typename T, Mask kMask, bool kInput, typename OnBlock>
void sum_columns(const BackwardArgs& args, const ColumnPlan& plan, const ColumnSums<Accumulate<T>>& sums,
                 const OnBlock& on_block) {
  if (plan.blocks > 1) {
    parallel(args.parallel_for, plan.blocks, plan.shape.values(), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const Tile tile = plan.tile_of_block(block);
        TileSums<T, kMask, kInput>(plan, args, tile).run(sums.g(0, tile.channel_begin), sums.gx(0, tile.channel_begin));
        sums.finish(args, tile.channel_begin, tile.channel_end);
        on_block(tile);
      }
    });
    return;
  }
  parallel(args.parallel_for, plan.segments, plan.shape.values(), [&](int64_t begin, int64_t end) {
    for (int64_t segment = begin; segment < end; ++segment) {
      TileSums<T, kMask, kInput>(plan, args, plan.tile_of_segment(segment))
          .run(sums.g(segment, 0), sums.gx(segment, 0));
    }
  });
  sums.finish(args, 0, plan.shape.channels);
}

template <typename T>
void columns_backward(const BackwardArgs& args) {
  const ColumnPlan plan(args.shape, sizeof(T));
  const ColumnSums<Accumulate<T>> sums(plan);
  with_mask(args,
            [&](auto mask, auto input) { sum_columns<T, mask(), input()>(args, plan, sums, [](const Tile&) {}); });
}

/// Writes dx of all rows, segment by segment.
template <typename T, Mask kMask>
void input_gradient_of_segments(const BackwardArgs& args, const ColumnPlan& plan, const double* sum_g,
                                const double* sum_gx) {
  const TileInputGradient<T, kMask> gradient(plan, args, plan.tile_of_segment(0), sum_g, sum_gx);
  parallel(args.parallel_for, plan.segments, plan.shape.values(), [&](int64_t begin, int64_t end) {
    for (int64_t segment = end - 1; segment >= begin; --segment) {
      gradient.run(plan.tile_of_segment(segment));
    }
  });
}

template <typename T>
void columns_backward_through_statistics(const BackwardArgs& args) {
  const ColumnPlan plan(args.shape, sizeof(T), /*arrays=*/2);
  const BackwardArgs first = first_half(args);
  const BackwardArgs second = second_half(args);
  const ColumnSums<Accumulate<T>> sums(plan);
  with_halves(first, second, [&](auto mask, auto left) {
    sum_columns<T, mask(), true>(first, plan, sums, [&](const Tile& tile) {
      TileInputGradient<T, left()>(plan, second, tile, sums.g(0, 0), sums.gx(0, 0)).run(tile);
    });
    if (plan.blocks == 1) {
      input_gradient_of_segments<T, left()>(second, plan, sums.g(0, 0), sums.gx(0, 0));
    }
  });
}

/// Writes dx from the sums that are given.
template <typename T>
void columns_gradient_of_input(const BackwardArgs& args) {
  const ColumnPlan plan(args.shape, sizeof(T));
  const BackwardArgs second = second_half(args);
  const double* sum_g = args.sums;
  const double* sum_gx = args.sums + args.shape.channels;
  with_input_mask(second, [&](auto mask) {
    if (plan.blocks == 1) {
      return input_gradient_of_segments<T, mask()>(second, plan, sum_g, sum_gx);
    }
    parallel(args.parallel_for, plan.blocks, plan.shape.values(), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const Tile tile = plan.tile_of_block(block);
        TileInputGradient<T, mask()>(plan, second, tile, sum_g, sum_gx).run(tile);
      }
    });
  });
}

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
