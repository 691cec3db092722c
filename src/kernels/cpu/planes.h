#pragma once

#include "kernels/cpu/backward_run.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/moments.h"
#include "kernels/cpu/normalize_run.h"
#include "kernels/cpu/parallel.h"

#include <memory>
#include <span>
#include <vector>

// [outer][channels][inner] with long planes. One group of channels at a time, so that its second read comes from the
// cache; and while a group is normalised piece by piece, the next one is summed up, so that memory is never idle. Where
// there are few channels each is split into a number of segments that depends on the shape alone, merged in order: the
// same bits for any number of threads.

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// A piece of a channel takes about this many bytes: it stays in the first-level cache, and few enough values are
/// added up in one register lane.
constexpr int64_t kPieceBytes = int64_t{16} * 1024;
/// A group of neighbouring channels takes at most about this many bytes: with the next one it fits the second-level
/// cache, and the longer the runs of memory, the faster they are read.
constexpr int64_t kGroupBytes = int64_t{400} * 1024;
/// From so many channels on, a channel is a task of its own.
constexpr int64_t kEnoughChannels = 32;

/// Part of a channel: the same `n` consecutive values of some planes.
struct Piece {
  int64_t offset;  // of the first plane's first value, from the channel's first
  int64_t planes;
  int64_t n;
};

/// A channel in pieces and segments.
class PlanePieces {
 public:
  PlanePieces(const Shape& shape, int64_t element_size)
      : stride_(shape.channels * shape.inner), inner_(shape.inner), planes_(shape.outer) {
    const int64_t values = kPieceBytes / element_size;
    const int64_t channel_bytes = shape.values_per_channel() * element_size;
    group_ = std::clamp<int64_t>(std::min(kGroupBytes / channel_bytes, values / inner_), 1, kEnoughChannels / 4);
    planes_per_piece_ = std::max<int64_t>(1, values / (inner_ * group_));
    pieces_per_plane_ = divide_up(inner_, values);
    // In whole cache lines.
    size_ = divide_up(divide_up(inner_, pieces_per_plane_), 64) * 64;
    pieces_per_plane_ = divide_up(inner_, size_);
    count_ = pieces_per_plane_ * divide_up(planes_, planes_per_piece_);
    segments_ =
        shape.channels >= kEnoughChannels ? 1 : std::min(count_, divide_up(2 * kEnoughChannels, shape.channels));
  }

  Piece operator[](int64_t i) const {
    const int64_t plane = i / pieces_per_plane_ * planes_per_piece_;
    const int64_t begin = i % pieces_per_plane_ * size_;
    return {plane * stride_ + begin, std::min(planes_per_piece_, planes_ - plane), std::min(size_, inner_ - begin)};
  }

  /// How far piece i + 1 lies from piece i, or 0 where there is none.
  int64_t to_next(int64_t i) const { return i + 1 < count_ ? (*this)[i + 1].offset - (*this)[i].offset : 0; }

  int64_t stride() const { return stride_; }  // from plane to plane
  int64_t inner() const { return inner_; }    // from channel to channel
  int64_t group() const { return group_; }    // channels
  int64_t segments() const { return segments_; }
  int64_t segment_begin(int64_t segment) const { return count_ * segment / segments_; }

 private:
  int64_t stride_;
  int64_t inner_;
  int64_t planes_;
  int64_t group_;
  int64_t planes_per_piece_;
  int64_t pieces_per_plane_;
  int64_t size_;
  int64_t count_;
  int64_t segments_;
};

/// Takes piece i of neighbouring channels, of which the first begins at x, into their sums, in the order of memory.
template <typename T>
void add_piece(const PlanePieces& pieces, int64_t i, const T* x, std::span<RunSums<T>> sums, int64_t ahead) {
  const Piece piece = pieces[i];
  for (int64_t p = 0; p < piece.planes; ++p) {
    const T* from = x + piece.offset + p * pieces.stride();
    for (auto& of_channel : sums) {
      of_channel.add(from, piece.n, ahead);
      from += pieces.inner();
    }
  }
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
    for (int64_t i = begin(); i < end(); ++i) add_piece<T>(pieces, i, x, {&sums, 1}, pieces.to_next(i));
    return sums;
  }

  Moments in_double() const {
    DoubleMoments moments;
    for (int64_t i = begin(); i < end(); ++i) {
      const Piece piece = pieces[i];
      for (int64_t p = 0; p < piece.planes; ++p) {
        for (int64_t k = 0; k < piece.n; ++k) moments.add(x[piece.offset + p * pieces.stride() + k]);
      }
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
  void statistics() const {
    if (pieces_.segments() > 1) return statistics_of_all();
    parallel(args_.parallel_for, args_.shape.channels, args_.shape.values(), [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; group += pieces_.group()) {
        std::vector<RunSums<T>> sums = first_sums(group, end);
        for (int64_t i = 0; i < pieces_.segment_begin(1); ++i) {
          add_piece<T>(pieces_, i, channel_of_x(group), sums, pieces_.to_next(i));
        }
        for (size_t k = 0; k < sums.size(); ++k) {
          const int64_t channel = group + static_cast<int64_t>(k);
          finish(channel, segment(channel, 0).moments(sums[k]));
        }
      }
    });
  }

  void run(bool with_statistics) const {
    const int64_t channels = args_.shape.channels;
    if (pieces_.segments() > 1) {
      if (with_statistics) statistics_of_all();
      parallel_segments([&](int64_t task) { normalize(task / pieces_.segments(), task % pieces_.segments()); });
    } else if (with_statistics) {
      parallel(args_.parallel_for, channels, args_.shape.values(),
               [&](int64_t begin, int64_t end) { pipeline(begin, end); });
    } else {
      parallel_segments([&](int64_t channel) { normalize(channel, 0); });
    }
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

  void statistics_of_all() const {
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

  /// Whole channels: sums up the first group; then normalises each while it sums up the next.
  void pipeline(int64_t begin, int64_t end) const {
    const int64_t last_piece = pieces_.segment_begin(1);
    std::vector<RunSums<T>> sums = first_sums(begin, end);
    for (int64_t i = 0; i < last_piece; ++i) add_piece<T>(pieces_, i, channel_of_x(begin), sums, pieces_.to_next(i));
    std::vector<Coefficients<T>> coefficients;
    for (int64_t group = begin; group < end; group += pieces_.group()) {
      coefficients.clear();
      for (size_t k = 0; k < sums.size(); ++k) {
        const int64_t channel = group + static_cast<int64_t>(k);
        finish(channel, segment(channel, 0).moments(sums[k]));
        coefficients.push_back(coefficients_of(channel));
      }
      const int64_t next = group + pieces_.group();
      sums = first_sums(next, end);
      const int64_t to_next_group = next < end ? pieces_.group() * args_.shape.inner : 0;
      for (int64_t i = 0; i < last_piece; ++i) {
        // While this piece is written, the next group's next one is on its way.
        normalize_piece(coefficients, group, i, to_next_group + pieces_.to_next(i));
        add_piece<T>(pieces_, i, channel_of_x(next), sums, 0);
      }
    }
    if constexpr (kStream) streaming_done();
  }

  /// Empty sums for the channels of the group from `channel` on; none where that is `end`.
  std::vector<RunSums<T>> first_sums(int64_t channel, int64_t end) const {
    std::vector<RunSums<T>> sums;
    const int64_t group_end = std::min(channel + pieces_.group(), end);
    for (; channel < group_end; ++channel) sums.push_back(segment(channel, 0).sums());
    return sums;
  }

  void normalize(int64_t channel, int64_t index) const {
    const Coefficients<T> coefficients = coefficients_of(channel);
    for (int64_t i = pieces_.segment_begin(index); i < pieces_.segment_begin(index + 1); ++i) {
      normalize_piece({&coefficients, 1}, channel, i, pieces_.to_next(i));
    }
  }

  Coefficients<T> coefficients_of(int64_t channel) const {
    return {static_cast<const A*>(args_.center)[channel], static_cast<const A*>(args_.scale)[channel],
            static_cast<const A*>(args_.shift)[channel]};
  }

  void normalize_piece(std::span<const Coefficients<T>> coefficients, int64_t group, int64_t i, int64_t ahead) const {
    const Piece piece = pieces_[i];
    const int64_t first = group * args_.shape.inner + piece.offset;
    for (int64_t p = 0; p < piece.planes; ++p) {
      int64_t offset = first + p * pieces_.stride();
      for (const auto& of_channel : coefficients) {
        const T* x = static_cast<const T*>(args_.x) + offset;
        const T* residual = kResidual ? static_cast<const T*>(args_.residual) + offset : nullptr;
        T* y = static_cast<T*>(args_.y) + offset;
        normalize_run<T, kResidual, kRelu, kStream>(x, residual, y, piece.n, of_channel, ahead);
        offset += args_.shape.inner;
      }
    }
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
  /// How far in advance memory is asked for, where all is read in its order.
  static constexpr int64_t kAhead = int64_t{4} * 1024 / static_cast<int64_t>(sizeof(T));

  Runs runs_of(int64_t channel) const {
    return {static_cast<const A*>(args_.scale)[channel], static_cast<const A*>(args_.center)[channel]};
  }

  void write(int64_t channel, const Sums& sums) const {
    args_.sum_g[channel] = sums.first;
    args_.sum_gx[channel] = sums.second;
  }

  /// Values are read once, so in the order of memory: all channels of an image, then the next one.
  void run_channels(int64_t begin, int64_t end) const {
    std::vector<Runs> runs;
    runs.reserve(static_cast<size_t>(end - begin));
    for (int64_t channel = begin; channel < end; ++channel) runs.push_back(runs_of(channel));
    for (int64_t outer = 0; outer < args_.shape.outer; ++outer) {
      BackwardPointers<T> pointers(args_);
      pointers.advance(outer * pieces_.stride() + begin * args_.shape.inner);
      for (auto& of_channel : runs) {
        of_channel.add(pointers, args_.shape.inner, kAhead);
        pointers.advance(args_.shape.inner);
      }
    }
    for (int64_t channel = begin; channel < end; ++channel)
      write(channel, runs[static_cast<size_t>(channel - begin)].get());
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
      for (int64_t p = 0; p < piece.planes; ++p) {
        runs.add(pointers, piece.n, pieces_.to_next(i));
        pointers.advance(pieces_.stride());
      }
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
