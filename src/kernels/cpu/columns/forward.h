#pragma once

#include "kernels/cpu/blend.h"
#include "kernels/cpu/columns/per_column.h"
#include "kernels/cpu/columns/plan.h"
#include "kernels/cpu/columns/totals.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/normalize_run.h"

#include <optional>

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// Normalises tiles of the same channels.
template <typename T, bool kResidual, bool kRelu, bool kStream>
class TileNormalizer {
  using P = Pack<T>;

 public:
  TileNormalizer(const ColumnPlan& plan, const ForwardArgs& args, const Tile& tile)
      : plan_(plan),
        args_(args),
        coefficients_(Channels<Accumulate<T>>(args), tile.channel_begin, tile.channel_end, plan.shape.inner,
                      {args.y, 2}) {}

  /// Goes backwards, as a tile's last rows were read last.
  void run(const Tile& tile) const {
    const RowOrder order(plan_.far, tile.rows(), kRowsTogether);
    for (int64_t row = tile.rows() - 1; row >= order.rest; --row) {
      run_rows<1, false>(tile, row, 1);
    }
    for (int64_t step = order.steps - 1; step >= 0; --step) {
      const int64_t row = step * order.next;
      plan_.far ? run_rows<kRowsTogether, true>(tile, row, order.apart)
                : run_rows<kRowsTogether, false>(tile, row, order.apart);
    }
  }

 private:
  /// Normalises kRows of the tile from `row` on, with `apart` rows from one to the next.
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
      const PackCoefficients<T> coefficients = coefficients_.at(c);
      // All reads come before the writes: a row may lie a multiple of 4 KB from the next, and a read waits for a write
      // to an address with the same last 12 bits.
      P results[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t at = r * stride + c;
        if constexpr (kFar) {
          prefetch(x + at - ahead);
          if constexpr (kResidual) {
            prefetch(residual + at - ahead);
          }
        }
        results[r] = normalized_pack<T, kResidual, kRelu>(coefficients, P::load_any_order(x + at),
                                                          kResidual ? P::load_any_order(residual + at) : P());
      }
      for (int64_t r = 0; r < kRows; ++r) {
        results[r].template store_any_order<kStream>(y + r * stride + c);
      }
    }
    if (c == width) {
      return;
    }
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t at = r * stride + c;
      normalized_pack<T, kResidual, kRelu>(coefficients_.at(c), P::load_any_order(x + at, width - c),
                                           kResidual ? P::load_any_order(residual + at, width - c) : P())
          .store_any_order(y + at, width - c);
    }
  }

  const ColumnPlan& plan_;
  const ForwardArgs& args_;
  ForwardPerColumn<T> coefficients_;
};

/// Forms the statistics of all channels, or of those of one block.
template <typename T>
class ColumnsStatistics {
  using A = Accumulate<T>;

 public:
  ColumnsStatistics(const ColumnPlan& plan, const void* x, ParallelFor parallel_for, const MomentsSink<A>& sink)
      : plan_(plan),
        x_(static_cast<const T*>(x)),
        parallel_for_(parallel_for),
        sink_(sink),
        count_(static_cast<double>(plan.shape.values_per_channel())) {}

  /// What a thread needs for the blocks that it takes.
  class OfBlocks {
   public:
    explicit OfBlocks(const ColumnsStatistics& statistics)
        : of_(statistics),
          tile_totals_(of_.plan_, of_.x_, of_.plan_.channels_per_block),
          shifts_(of_.plan_.channels_per_block),
          first_(of_.plan_.channels_per_block),
          second_(of_.plan_.channels_per_block) {}

    void run(const Tile& tile) {
      const Totals totals = {first_.get(), second_.get()};
      first_shifts(of_.plan_, of_.x_ + tile.channel_begin * of_.plan_.shape.inner, tile.channels(), shifts_.get());
      tile_totals_.compute(tile, shifts_.get(), totals);
      if (move_far_shifts(totals, tile.channels(), of_.count_, shifts_.get())) {
        tile_totals_.compute(tile, shifts_.get(), totals);
      }
      of_.finish(tile, totals, shifts_.get());
    }

   private:
    const ColumnsStatistics& of_;
    TileTotals<T> tile_totals_;
    Scratch<A> shifts_;
    Scratch<double> first_;
    Scratch<double> second_;
  };

  void of_segments() const {
    const int64_t channels = plan_.shape.channels;
    const Scratch<A> shifts(channels);
    const Scratch<double> first(plan_.segments * channels);
    const Scratch<double> second(plan_.segments * channels);
    const Totals totals = {first.get(), second.get()};
    const int64_t parts = divide_up(channels, kChannelsTogether);
    const Scratch<bool> far(parts);
    first_shifts(plan_, x_, channels, shifts.get());
    add_segments(shifts.get(), totals);
    finish_parts(parts, [&](int64_t part, const Tile& tile) {
      add_up_segments(tile, totals);
      const Totals here = {totals.first + tile.channel_begin, totals.second + tile.channel_begin};
      far.get()[part] = move_far_shifts(here, tile.channels(), count_, shifts.get() + tile.channel_begin);
      if (!far.get()[part]) {
        finish(tile, here, shifts.get() + tile.channel_begin);
      }
    });
    if (std::none_of(far.get(), far.get() + parts, [](bool is_far) { return is_far; })) {
      return;
    }
    add_segments(shifts.get(), totals);
    finish_parts(parts, [&](int64_t part, const Tile& tile) {
      if (!far.get()[part]) {
        return;
      }
      add_up_segments(tile, totals);
      finish(tile, {totals.first + tile.channel_begin, totals.second + tile.channel_begin},
             shifts.get() + tile.channel_begin);
    });
  }

 private:
  void finish(const Tile& tile, const Totals& totals, const A* shifts) const {
    moments_of_channels(plan_, x_ + tile.channel_begin * plan_.shape.inner, totals, shifts, tile.channels(),
                        sink_.mean + tile.channel_begin, sink_.m2 + tile.channel_begin);
    sink_.finish(tile.channel_begin, tile.channel_end);
  }

  /// Calls run(part, tile of its channels) for each part.
  template <typename Run>
  void finish_parts(int64_t parts, const Run& run) const {
    // A channel costs about as much as a hundred values.
    parallel(parallel_for_, parts, plan_.shape.channels * 100, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t channel = part * kChannelsTogether;
        run(part, Tile{channel, std::min(channel + kChannelsTogether, plan_.shape.channels), 0, plan_.rows});
      }
    });
  }

  void add_segments(const A* shifts, const Totals& totals) const {
    const int64_t channels = plan_.shape.channels;
    parallel(parallel_for_, plan_.segments, plan_.shape.values(), [&](int64_t begin, int64_t end) {
      TileTotals<T> tile_totals(plan_, x_, channels);
      for (int64_t segment = begin; segment < end; ++segment) {
        tile_totals.compute(plan_.tile_of_segment(segment), shifts,
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

  const ColumnPlan& plan_;
  const T* x_;
  ParallelFor parallel_for_;
  const MomentsSink<A>& sink_;
  double count_;
};

/// Forms the statistics and normalises.
/// @param statistics  may be null: they are then in args.saved already
template <typename T, typename Normalizer, bool kStream>
void columns_run(const ForwardArgs& args, const ColumnPlan& plan, const ColumnsStatistics<T>* statistics) {
  if (plan.blocks > 1) {
    parallel(args.parallel_for, plan.blocks, plan.shape.values(), [&](int64_t begin, int64_t end) {
      std::optional<typename ColumnsStatistics<T>::OfBlocks> of_blocks;
      if (statistics) {
        of_blocks.emplace(*statistics);
      }
      for (int64_t block = begin; block < end; ++block) {
        const Tile tile = plan.tile_of_block(block);
        if (of_blocks) {
          of_blocks->run(tile);
        }
        Normalizer(plan, args, tile).run(tile);
      }
      if constexpr (kStream) {
        streaming_done();
      }
    });
    return;
  }
  if (statistics) {
    statistics->of_segments();
  }
  const Normalizer normalizer(plan, args, plan.tile_of_segment(0));
  parallel(args.parallel_for, plan.segments, plan.shape.values(), [&](int64_t begin, int64_t end) {
    for (int64_t segment = end - 1; segment >= begin; --segment) {
      normalizer.run(plan.tile_of_segment(segment));
    }
    if constexpr (kStream) {
      streaming_done();
    }
  });
}

/// Tells whether all packs of all blocks of the rows from `to` on are aligned for streaming.
template <typename T>
bool can_stream_columns(const void* to, const ColumnPlan& plan) {
  const auto aligned = [](int64_t values) {
    return values * static_cast<int64_t>(sizeof(T)) % static_cast<int64_t>(sizeof(Bits)) == 0;
  };
  return can_stream_to(to) && aligned(plan.columns) && aligned(plan.channels_per_block * plan.shape.inner);
}

/// Writes y from what is in args.saved or, where there is a sink, from statistics that go there first.
template <typename T>
void columns_forward(const ForwardArgs& args, const MomentsSink<Accumulate<T>>* sink) {
  const ColumnPlan plan(args.shape, sizeof(T));
  std::optional<ColumnsStatistics<T>> statistics;
  if (sink) {
    statistics.emplace(plan, args.x, args.parallel_for, *sink);
  }
  const bool stream = args.stream && can_stream_columns<T>(args.y, plan);
  with_flags(args.residual != nullptr, args.relu, [&](auto residual, auto relu) {
    with_flag(stream, [&](auto streams) {
      constexpr bool kStream = streams() && kStreams<T>;
      columns_run<T, TileNormalizer<T, residual(), relu(), kStream>, kStream>(args, plan,
                                                                              statistics ? &*statistics : nullptr);
    });
  });
}

template <typename T>
void columns_statistics(const StatisticsArgs& args) {
  const ColumnPlan plan(args.shape, sizeof(T));
  const MomentsSink<Accumulate<T>> sink = {args.mean, args.m2, nullptr};
  const ColumnsStatistics<T> statistics(plan, args.x, args.parallel_for, sink);
  if (plan.blocks == 1) {
    return statistics.of_segments();
  }
  parallel(args.parallel_for, plan.blocks, plan.shape.values(), [&](int64_t begin, int64_t end) {
    typename ColumnsStatistics<T>::OfBlocks of_blocks(statistics);
    for (int64_t block = begin; block < end; ++block) {
      of_blocks.run(plan.tile_of_block(block));
    }
  });
}

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
