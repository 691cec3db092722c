#pragma once

#include "kernels/cpu/blend.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/moments.h"
#include "kernels/cpu/normalize_run.h"
#include "kernels/cpu/planes/pieces.h"
#include "kernels/cpu/simd/parallel.h"

#include <memory>
#include <optional>
#include <span>
#include <vector>

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// Takes the pieces [begin, end) of neighbouring channels, of which the first begins at x, into their sums.
template <typename T>
void add_pieces(const PlanePieces& pieces, int64_t begin, int64_t end, const T* x, std::span<RunSums<T>> sums) {
  for_pieces<kTogether>(
      pieces, begin, end,
      [&](const auto& offsets, int64_t n) {
        Together<T> from;
        for (size_t r = 0; r < from.size(); ++r) {
          from[r] = x + offsets[r];
        }
        for (auto& of_channel : sums) {
          of_channel.add(from, n);
          for (auto& run : from) {
            run += pieces.inner();
          }
        }
      },
      [&](int64_t offset, int64_t n) {
        for (auto& of_channel : sums) {
          of_channel.add(x + offset, n);
          offset += pieces.inner();
        }
      });
}

/// The values of one segment of one channel.
template <typename T>
struct Segment {
  const PlanePieces& pieces;
  const T* x;  // the channel's first value
  int64_t index;

  int64_t begin() const { return pieces.segment_begin(index); }
  int64_t end() const { return pieces.segment_begin(index + 1); }

  RunSums<T> sums() const {
    return RunSums<T>(
        first_shift<Accumulate<T>>(end() - begin(), [&](int64_t i) { return x[pieces[begin() + i].offset]; }));
  }

  RunSums<T> sums_around(Accumulate<T> shift) const {
    RunSums<T> sums(shift);
    add_pieces<T>(pieces, begin(), end(), x, {&sums, 1});
    return sums;
  }

  BatchMoments in_double() const {
    DoubleMoments moments;
    for (int64_t i = begin(); i < end(); ++i) {
      const Piece piece = pieces[i];
      for (int64_t k = 0; k < piece.n; ++k) {
        moments.add(x[piece.offset + k]);
      }
    }
    return moments.get();
  }

  /// Leads from complete sums, which are formed anew where they do not suffice, to the statistics.
  BatchMoments moments(const RunSums<T>& complete) const {
    const double count = complete.count();
    Sums sums = complete.get();
    auto shift = complete.shift();
    if (!shift_is_near(sums, count)) {
      shift = static_cast<Accumulate<T>>(moments_of(sums, shift, count).mean);
      if (std::isfinite(shift)) {
        sums = sums_around(shift).get();
      }
    }
    return std::isfinite(sums.second) ? moments_of(sums, shift, count) : in_double();
  }
};

/// Forms the statistics of whole channels or of their segments.
template <typename T>
class PlanesStatistics {
  using A = Accumulate<T>;

 public:
  PlanesStatistics(const Shape& shape, const void* x, const PlanePieces& pieces, const MomentsSink<A>& sink)
      : shape_(shape), x_(static_cast<const T*>(x)), pieces_(pieces), sink_(sink) {}

  /// Takes `count` neighbouring channels, which have one segment.
  void of_channels(int64_t first, int64_t count) const {
    std::vector<RunSums<T>> sums;
    sums.reserve(static_cast<size_t>(count));
    for (int64_t k = 0; k < count; ++k) {
      sums.push_back(segment(first + k, 0).sums());
    }
    add_pieces<T>(pieces_, 0, pieces_.segment_begin(1), channel(first), sums);
    for (int64_t k = 0; k < count; ++k) {
      finish(first + k, segment(first + k, 0).moments(sums[static_cast<size_t>(k)]));
    }
  }

  /// Takes all channels, segment by segment.
  void of_segments(ParallelFor parallel_for) const {
    const int64_t segments = pieces_.segments();
    const int64_t tasks = shape_.channels * segments;
    const std::unique_ptr<BatchMoments[]> parts(new BatchMoments[static_cast<size_t>(tasks)]);
    parallel(parallel_for, tasks, shape_.values(), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const auto part = segment(task / segments, task % segments);
        parts[static_cast<size_t>(task)] = part.moments(part.sums_around(part.sums().shift()));
      }
    });
    for (int64_t channel = 0; channel < shape_.channels; ++channel) {
      BatchMoments moments = {0, 0, 0};
      for (int64_t s = 0; s < segments; ++s) {
        merge(moments, parts[static_cast<size_t>(channel * segments + s)]);
      }
      finish(channel, moments);
    }
  }

 private:
  const T* channel(int64_t channel) const { return x_ + channel * shape_.inner; }

  Segment<T> segment(int64_t of_channel, int64_t index) const { return {pieces_, channel(of_channel), index}; }

  void finish(int64_t channel, const BatchMoments& moments) const {
    sink_.mean[channel] = moments.mean;
    sink_.m2[channel] = moments.m2;
    sink_.finish(channel, channel + 1);
  }

  const Shape& shape_;
  const T* x_;
  const PlanePieces& pieces_;
  const MomentsSink<A>& sink_;
};

/// Writes y of whole channels or of their segments.
template <typename T, bool kResidual, bool kRelu, bool kStream>
class PlanesNormalizer {
  using A = Accumulate<T>;

 public:
  PlanesNormalizer(const ForwardArgs& args, const PlanePieces& pieces)
      : args_(args), channels_(args), pieces_(pieces) {}

  /// Takes a segment of neighbouring channels.
  void run(int64_t first, int64_t count, int64_t segment) const {
    std::vector<PackCoefficients<T>> coefficients;
    coefficients.reserve(static_cast<size_t>(count));
    for (int64_t k = 0; k < count; ++k) {
      coefficients.emplace_back(channels_.coefficients(first + k));
    }
    const int64_t of_first = first * args_.shape.inner;
    const auto alone = [&](int64_t offset, int64_t n) {
      for (const auto& of_channel : coefficients) {
        normalize_run<T, kResidual, kRelu, kStream>(run_at(of_first + offset), n, of_channel);
        offset += args_.shape.inner;
      }
    };
    const int64_t begin = pieces_.segment_begin(segment);
    const int64_t end = pieces_.segment_begin(segment + 1);
    if constexpr (!kResidual) {
      // This goes backwards, as the last pieces were read last.
      for (int64_t i = end - 1; i >= begin; --i) {
        alone(pieces_[i].offset, pieces_[i].n);
      }
    } else {
      // The residual comes from memory, whatever the order.
      for_pieces<kResidualRuns>(
          pieces_, begin, end,
          [&](auto offsets, int64_t n) {
            for (const auto& of_channel : coefficients) {
              std::array<ForwardRun<T>, kResidualRuns> runs;
              for (size_t r = 0; r < runs.size(); ++r) {
                runs[r] = run_at(of_first + offsets[r]);
              }
              normalize_residual_runs<T, kRelu, kStream>(runs, n, of_channel);
              for (auto& offset : offsets) {
                offset += args_.shape.inner;
              }
            }
          },
          alone);
    }
  }

 private:
  ForwardRun<T> run_at(int64_t offset) const {
    return {static_cast<const T*>(args_.x) + offset,
            kResidual ? static_cast<const T*>(args_.residual) + offset : nullptr, static_cast<T*>(args_.y) + offset};
  }

  const ForwardArgs& args_;
  const Channels<A> channels_;
  const PlanePieces& pieces_;
};

/// Forms the statistics and normalises.
/// @param statistics  may be null: they are then in args.saved already
template <typename T, typename Normalizer, bool kStream>
void planes_run(const ForwardArgs& args, const PlanePieces& pieces, const PlanesStatistics<T>* statistics) {
  const Normalizer normalizer(args, pieces);
  const Shape& shape = args.shape;
  const int64_t segments = pieces.segments();
  if (segments > 1) {
    if (statistics) {
      statistics->of_segments(args.parallel_for);
    }
    parallel(args.parallel_for, shape.channels * segments, shape.values(), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        normalizer.run(task / segments, 1, task % segments);
      }
      if constexpr (kStream) {
        streaming_done();
      }
    });
    return;
  }
  parallel(args.parallel_for, shape.channels, shape.values(), [&](int64_t begin, int64_t end) {
    // Where nothing is read twice, values are taken in the order of memory: all channels of an image after each other.
    const int64_t group = statistics ? pieces.group() : end - begin;
    for (int64_t channel = begin; channel < end; channel += group) {
      const int64_t count = std::min(group, end - channel);
      if (statistics) {
        statistics->of_channels(channel, count);
      }
      normalizer.run(channel, count, 0);
    }
    if constexpr (kStream) {
      streaming_done();
    }
  });
}

/// Tells whether all runs of values of [outer][channels][inner] from `to` on are aligned for streaming.
template <typename T>
bool can_stream_planes(const void* to, const Shape& shape) {
  return can_stream_to(to) && shape.inner * static_cast<int64_t>(sizeof(T)) % static_cast<int64_t>(sizeof(Bits)) == 0;
}

/// Writes y from what is in args.saved or, where there is a sink, from statistics that go there first.
template <typename T>
void planes_forward(const ForwardArgs& args, const MomentsSink<Accumulate<T>>* sink) {
  const PlanePieces pieces(args.shape, sizeof(T));
  std::optional<PlanesStatistics<T>> statistics;
  if (sink) {
    statistics.emplace(args.shape, args.x, pieces, *sink);
  }
  const bool stream = args.stream && can_stream_planes<T>(args.y, args.shape);
  with_flags(args.residual != nullptr, args.relu, [&](auto residual, auto relu) {
    with_flag(stream, [&](auto streams) {
      constexpr bool kStream = streams() && kStreams<T>;
      planes_run<T, PlanesNormalizer<T, residual(), relu(), kStream>, kStream>(args, pieces,
                                                                               statistics ? &*statistics : nullptr);
    });
  });
}

template <typename T>
void planes_statistics(const StatisticsArgs& args) {
  const PlanePieces pieces(args.shape, sizeof(T));
  const MomentsSink<Accumulate<T>> sink = {args.mean, args.m2, nullptr};
  const PlanesStatistics<T> statistics(args.shape, args.x, pieces, sink);
  if (pieces.segments() > 1) {
    return statistics.of_segments(args.parallel_for);
  }
  parallel(args.parallel_for, args.shape.channels, args.shape.values(), [&](int64_t begin, int64_t end) {
    // Values are taken in the order of memory: all channels of an image after each other.
    statistics.of_channels(begin, end - begin);
  });
}

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
