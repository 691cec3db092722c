#pragma once

#include "kernels/cpu/backward_run.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/moments.h"
#include "kernels/cpu/normalize_run.h"
#include "kernels/cpu/parallel.h"

#include <memory>
#include <span>
#include <vector>

// [outer][channels][inner] with long planes. A group of channels at a time, so that its second read comes from the
// cache. A channel is read in several places at once, each in the order of memory: faster than in one. Where there are
// few channels each is split into a number of segments that depends on the shape alone, merged in order: the same bits
// for any number of threads.

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// A piece of a plane takes about this many bytes.
constexpr int64_t kPieceBytes = int64_t{16} * 1024;
/// A group of neighbouring channels takes at most about this many bytes: it fits the second-level cache, and the longer
/// the runs of memory, the faster they are read.
constexpr int64_t kGroupBytes = int64_t{400} * 1024;
/// From so many channels on, a channel is a task of its own.
constexpr int64_t kEnoughChannels = 32;

/// Consecutive values of a channel.
struct Piece {
  int64_t offset;  // from the channel's first value
  int64_t n;
};

/// A channel in pieces and segments.
class PlanePieces {
 public:
  PlanePieces(const Shape& shape, int64_t element_size)
      : stride_(shape.channels * shape.inner), inner_(shape.inner), per_plane_(1) {
    const int64_t channel_bytes = shape.values_per_channel() * element_size;
    group_ = std::clamp<int64_t>(kGroupBytes / channel_bytes, 1, kEnoughChannels / 4);
    // In whole cache lines.
    size_ = divide_up(divide_up(inner_, divide_up(inner_ * element_size, kPieceBytes)), 64) * 64;
    per_plane_ = divide_up(inner_, size_);
    count_ = per_plane_ * shape.outer;
    segments_ =
        shape.channels >= kEnoughChannels ? 1 : std::min(count_, divide_up(2 * kEnoughChannels, shape.channels));
  }

  Piece operator[](int64_t i) const {
    const int64_t begin = i % per_plane_ * size_;
    return {i / per_plane_ * stride_ + begin, std::min(size_, inner_ - begin)};
  }

  int64_t inner() const { return inner_; }  // from channel to channel
  int64_t group() const { return group_; }  // channels
  int64_t segments() const { return segments_; }
  int64_t segment_begin(int64_t segment) const { return count_ * segment / segments_; }

 private:
  int64_t stride_;  // from plane to plane
  int64_t inner_;
  int64_t per_plane_;
  int64_t group_;
  int64_t size_;
  int64_t count_;
  int64_t segments_;
};

/// Goes through the pieces [begin, end), several at once: calls together(offsets, n) for as many values as all of
/// kCount pieces have, and alone(offset, n) for what is left of one.
template <size_t kCount, typename OnTogether, typename OnAlone>
void for_pieces(const PlanePieces& pieces, int64_t begin, int64_t end, const OnTogether& together,
                const OnAlone& alone) {
  int64_t i = begin;
  for (; i + static_cast<int64_t>(kCount) <= end; i += static_cast<int64_t>(kCount)) {
    std::array<int64_t, kCount> offsets;
    std::array<int64_t, kCount> n;
    for (size_t r = 0; r < kCount; ++r) {
      const Piece piece = pieces[i + static_cast<int64_t>(r)];
      offsets[r] = piece.offset;
      n[r] = piece.n;
    }
    // The last piece of a plane may be shorter than the others.
    const int64_t shortest = *std::min_element(n.begin(), n.end());
    together(offsets, shortest);
    for (size_t r = 0; r < kCount; ++r) {
      if (n[r] > shortest) alone(offsets[r] + shortest, n[r] - shortest);
    }
  }
  for (; i < end; ++i) alone(pieces[i].offset, pieces[i].n);
}

/// Takes the pieces [begin, end) of neighbouring channels, of which the first begins at x, into their sums.
template <typename T>
void add_pieces(const PlanePieces& pieces, int64_t begin, int64_t end, const T* x, std::span<RunSums<T>> sums) {
  for_pieces<kTogether>(
      pieces, begin, end,
      [&](const auto& offsets, int64_t n) {
        Together<T> from;
        for (size_t r = 0; r < from.size(); ++r) from[r] = x + offsets[r];
        for (auto& of_channel : sums) {
          of_channel.add(from, n);
          for (auto& run : from) run += pieces.inner();
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

  Moments in_double() const {
    DoubleMoments moments;
    for (int64_t i = begin(); i < end(); ++i) {
      const Piece piece = pieces[i];
      for (int64_t k = 0; k < piece.n; ++k) moments.add(x[piece.offset + k]);
    }
    return moments.get();
  }

  /// From complete sums, which are formed anew where they do not suffice.
  Moments moments(const RunSums<T>& complete) const {
    const double count = complete.count();
    Sums sums = complete.get();
    auto shift = complete.shift();
    if (!shift_is_near(sums, count)) {
      shift = static_cast<Accumulate<T>>(moments_of(sums, shift, count).mean);
      if (std::isfinite(shift)) sums = sums_around(shift).get();
    }
    return std::isfinite(sums.second) ? moments_of(sums, shift, count) : in_double();
  }
};

template <typename T, bool kResidual, bool kRelu, bool kStream>
class PlanesForward {
  using A = Accumulate<T>;

 public:
  PlanesForward(const ForwardArgs& args, const PlanePieces& pieces) : args_(args), pieces_(pieces) {}

  /// mean and m2, nothing else.
  void statistics() const { pieces_.segments() == 1 ? run_channels(true, false) : statistics_of_segments(); }

  void run(bool with_statistics) const {
    if (pieces_.segments() == 1) return run_channels(with_statistics, true);
    if (with_statistics) statistics_of_segments();
    parallel_segments([&](int64_t task) { normalize(task / pieces_.segments(), 1, task % pieces_.segments()); });
  }

 private:
  template <typename Run>
  void parallel_segments(const Run& run) const {
    parallel(args_.parallel_for, args_.shape.channels * pieces_.segments(), args_.shape.values(),
             [&](int64_t begin, int64_t end) {
               for (int64_t task = begin; task < end; ++task) run(task);
               if constexpr (kStream) streaming_done();
             });
  }

  const T* channel_of_x(int64_t channel) const { return static_cast<const T*>(args_.x) + channel * args_.shape.inner; }

  Segment<T> segment(int64_t channel, int64_t index) const { return {pieces_, channel_of_x(channel), index}; }

  void finish(int64_t channel, const Moments& moments) const {
    args_.mean[channel] = moments.mean;
    args_.m2[channel] = moments.m2;
    args_.blend(args_.blend_context, channel, channel + 1);
  }

  void statistics_of_segments() const {
    const int64_t segments = pieces_.segments();
    const std::unique_ptr<Moments[]> parts(new Moments[static_cast<size_t>(args_.shape.channels * segments)]);
    parallel_segments([&](int64_t task) {
      const auto part = segment(task / segments, task % segments);
      parts[static_cast<size_t>(task)] = part.moments(part.sums_around(part.sums().shift()));
    });
    for (int64_t channel = 0; channel < args_.shape.channels; ++channel) {
      Moments moments;
      for (int64_t s = 0; s < segments; ++s) merge(moments, parts[static_cast<size_t>(channel * segments + s)]);
      finish(channel, moments);
    }
  }

  /// Whole channels.
  void run_channels(bool with_statistics, bool normalizes) const {
    parallel(args_.parallel_for, args_.shape.channels, args_.shape.values(), [&](int64_t begin, int64_t end) {
      // Where nothing is read twice, in the order of memory: all channels of an image after each other.
      const int64_t group = with_statistics && normalizes ? pieces_.group() : end - begin;
      for (int64_t channel = begin; channel < end; channel += group) {
        const int64_t count = std::min(group, end - channel);
        if (with_statistics) statistics_of_channels(channel, count);
        if (normalizes) normalize(channel, count, 0);
      }
      if constexpr (kStream) streaming_done();
    });
  }

  void statistics_of_channels(int64_t first, int64_t count) const {
    std::vector<RunSums<T>> sums;
    for (int64_t k = 0; k < count; ++k) sums.push_back(segment(first + k, 0).sums());
    add_pieces<T>(pieces_, 0, pieces_.segment_begin(1), channel_of_x(first), sums);
    for (int64_t k = 0; k < count; ++k) {
      finish(first + k, segment(first + k, 0).moments(sums[static_cast<size_t>(k)]));
    }
  }

  /// A segment of neighbouring channels.
  void normalize(int64_t first, int64_t count, int64_t segment) const {
    std::vector<Coefficients<T>> coefficients;
    for (int64_t k = 0; k < count; ++k) coefficients.push_back(coefficients_of(first + k));
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
      // Backwards: the last pieces were read last.
      for (int64_t i = end - 1; i >= begin; --i) alone(pieces_[i].offset, pieces_[i].n);
    } else {
      // The residual comes from memory, whatever the order.
      for_pieces<kResidualRuns>(
          pieces_, begin, end,
          [&](auto offsets, int64_t n) {
            for (const auto& of_channel : coefficients) {
              std::array<ForwardRun<T>, kResidualRuns> runs;
              for (size_t r = 0; r < runs.size(); ++r) runs[r] = run_at(of_first + offsets[r]);
              normalize_residual_runs<T, kRelu, kStream>(runs, n, of_channel);
              for (auto& offset : offsets) offset += args_.shape.inner;
            }
          },
          alone);
    }
  }

  ForwardRun<T> run_at(int64_t offset) const {
    return {static_cast<const T*>(args_.x) + offset,
            kResidual ? static_cast<const T*>(args_.residual) + offset : nullptr, static_cast<T*>(args_.y) + offset};
  }

  Coefficients<T> coefficients_of(int64_t channel) const {
    return {static_cast<const A*>(args_.center)[channel], static_cast<const A*>(args_.scale)[channel],
            static_cast<const A*>(args_.shift)[channel]};
  }

  const ForwardArgs& args_;
  const PlanePieces& pieces_;
};

/// Whether all runs of values of [outer][channels][inner] from `to` on are aligned for streaming.
template <typename T>
bool can_stream_planes(const void* to, const Shape& shape) {
  return can_stream_to(to) && shape.inner * static_cast<int64_t>(sizeof(T)) % static_cast<int64_t>(sizeof(Bits)) == 0;
}

template <typename T>
void planes_forward(const ForwardArgs& args, bool with_statistics) {
  const PlanePieces pieces(args.shape, sizeof(T));
  const bool stream = args.stream && can_stream_planes<T>(args.y, args.shape);
  with_flags(args.residual != nullptr, args.relu, [&](auto residual, auto relu) {
    with_flag(stream, [&](auto streams) {
      PlanesForward<T, residual(), relu(), streams() && kStreams<T>>(args, pieces).run(with_statistics);
    });
  });
}

template <typename T>
void planes_statistics(const ForwardArgs& args) {
  const PlanePieces pieces(args.shape, sizeof(T));
  PlanesForward<T, false, false, false>(args, pieces).statistics();
}

template <typename T, bool kMask, bool kInput, bool kStream>
class PlanesBackward {
  using A = Accumulate<T>;
  using Runs = BackwardRuns<T, kMask, kInput, kStream>;

 public:
  PlanesBackward(const BackwardArgs& args, const PlanePieces& pieces) : args_(args), pieces_(pieces) {}

  void run() const {
    const int64_t channels = args_.shape.channels;
    if (pieces_.segments() > 1) return run_segments();
    parallel(args_.parallel_for, channels, args_.shape.values(), [&](int64_t begin, int64_t end) {
      for (int64_t channel = begin; channel < end; channel += kChannelsAtOnce) {
        run_channels(channel, std::min(channel + kChannelsAtOnce, end));
      }
      if constexpr (kStream) streaming_done();
    });
  }

 private:
  /// So many channels' sums stay near.
  static constexpr int64_t kChannelsAtOnce = 256;

  Runs runs_of(int64_t channel) const {
    return {static_cast<const A*>(args_.scale)[channel], static_cast<const A*>(args_.center)[channel]};
  }

  void write(int64_t channel, const Sums& sums) const {
    args_.sum_g[channel] = sums.first;
    args_.sum_gx[channel] = sums.second;
  }

  /// Values are read once, so in the order of memory: all channels of some images, then of the next ones.
  void run_channels(int64_t begin, int64_t end) const {
    const int64_t inner = args_.shape.inner;
    const int64_t stride = args_.shape.channels * inner;
    std::vector<Runs> runs;
    runs.reserve(static_cast<size_t>(end - begin));
    for (int64_t channel = begin; channel < end; ++channel) runs.push_back(runs_of(channel));
    const auto for_channels = [&](int64_t image, const auto& add) {
      BackwardPointers<T> pointers(args_);
      pointers.advance(image * stride + begin * inner);
      for (auto& of_channel : runs) {
        add(of_channel, pointers);
        pointers.advance(inner);
      }
    };
    int64_t image = 0;
    for (; image + Runs::kRuns <= args_.shape.outer; image += Runs::kRuns) {
      for_channels(image, [&](Runs& to, const auto& pointers) { to.add_together(pointers, stride, inner); });
    }
    for (; image < args_.shape.outer; ++image) {
      for_channels(image, [&](Runs& to, const auto& pointers) { to.add(pointers, inner); });
    }
    for (int64_t channel = begin; channel < end; ++channel) {
      write(channel, runs[static_cast<size_t>(channel - begin)].get());
    }
  }

  void run_segments() const {
    const int64_t segments = pieces_.segments();
    const int64_t tasks = args_.shape.channels * segments;
    const std::unique_ptr<Sums[]> parts(new Sums[static_cast<size_t>(tasks)]);
    parallel(args_.parallel_for, tasks, args_.shape.values(), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        parts[static_cast<size_t>(task)] = run_segment(task / segments, task % segments);
      }
      if constexpr (kStream) streaming_done();
    });
    for (int64_t channel = 0; channel < args_.shape.channels; ++channel) {
      Sums sums = {0, 0};
      for (int64_t s = 0; s < segments; ++s) {
        const Sums& part = parts[static_cast<size_t>(channel * segments + s)];
        sums.first += part.first;
        sums.second += part.second;
      }
      write(channel, sums);
    }
  }

  Sums run_segment(int64_t channel, int64_t segment) const {
    Runs runs = runs_of(channel);
    for (int64_t i = pieces_.segment_begin(segment); i < pieces_.segment_begin(segment + 1); ++i) {
      const Piece piece = pieces_[i];
      BackwardPointers<T> pointers(args_);
      pointers.advance(channel * args_.shape.inner + piece.offset);
      runs.add(pointers, piece.n);
    }
    return runs.get();
  }

  const BackwardArgs& args_;
  const PlanePieces& pieces_;
};

template <typename T>
void planes_backward(const BackwardArgs& args) {
  const PlanePieces pieces(args.shape, sizeof(T));
  const bool streams = args.stream && (!args.dx || can_stream_planes<T>(args.dx, args.shape)) &&
                       (!args.dresidual || can_stream_planes<T>(args.dresidual, args.shape));
  with_flags(args.y != nullptr, args.x != nullptr, [&](auto mask, auto input) {
    with_flag(streams,
              [&](auto stream) { PlanesBackward<T, mask(), input(), stream() && kStreams<T>>(args, pieces).run(); });
  });
}

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
