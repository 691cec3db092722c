#pragma once

#include "kernels/cpu/backward_run.h"
#include "kernels/cpu/planes/forward.h"
#include "kernels/cpu/planes/pieces.h"
#include "kernels/cpu/simd/parallel.h"

#include <memory>
#include <vector>

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// Forms the sums of whole channels or of their segments, and writes what is written beside them.
template <typename T, Mask kMask, bool kInput, bool kStream>
class PlanesSums {
  using A = Accumulate<T>;
  using Runs = BackwardRuns<T, kMask, kInput, kStream>;

 public:
  PlanesSums(const BackwardArgs& args, const PlanePieces& pieces) : args_(args), channels_(args), pieces_(pieces) {}

  /// Takes all channels, each value read once.
  void run() const {
    if (pieces_.segments() > 1) {
      of_segments([](int64_t, const GradientSums&) {});
      return;
    }
    parallel(args_.parallel_for, args_.shape.channels, args_.shape.values(), [&](int64_t begin, int64_t end) {
      for (int64_t channel = begin; channel < end; channel += kChannelsAtOnce) {
        in_order_of_memory(channel, std::min(channel + kChannelsAtOnce, end));
      }
      if constexpr (kStream) {
        streaming_done();
      }
    });
  }

  /// Takes neighbouring channels, which are read again soon.
  void of_channels(int64_t first, int64_t count, GradientSums* sums) const {
    std::vector<Runs> runs = runs_of(first, first + count);
    BackwardPointers<T> pointers(args_);
    pointers.advance(first * args_.shape.inner);
    for_pieces<Runs::kRuns>(
        pieces_, 0, pieces_.segment_begin(1),
        [&](auto offsets, int64_t n) {
          for (auto& of_channel : runs) {
            of_channel.add_together(pointers, offsets, n);
            for (auto& offset : offsets) {
              offset += args_.shape.inner;
            }
          }
        },
        [&](int64_t offset, int64_t n) {
          for (auto& of_channel : runs) {
            BackwardPointers<T> run = pointers;
            run.advance(offset);
            of_channel.add(run, n);
            offset += args_.shape.inner;
          }
        });
    for (int64_t k = 0; k < count; ++k) {
      sums[k] = finish_sums(args_, channels_, first + k, runs[static_cast<size_t>(k)].get());
    }
  }

  /// Takes all channels, segment by segment, and then calls finish(channel, sums) for each.
  template <typename Finish>
  void of_segments(const Finish& finish) const {
    const int64_t segments = pieces_.segments();
    const int64_t tasks = args_.shape.channels * segments;
    const std::unique_ptr<Sums[]> parts(new Sums[static_cast<size_t>(tasks)]);
    parallel(args_.parallel_for, tasks, args_.shape.values(), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        parts[static_cast<size_t>(task)] = of_segment(task / segments, task % segments);
      }
      if constexpr (kStream) {
        streaming_done();
      }
    });
    for (int64_t channel = 0; channel < args_.shape.channels; ++channel) {
      Sums sums = {0, 0};
      for (int64_t s = 0; s < segments; ++s) {
        const Sums& part = parts[static_cast<size_t>(channel * segments + s)];
        sums.first += part.first;
        sums.second += part.second;
      }
      finish(channel, finish_sums(args_, channels_, channel, sums));
    }
  }

 private:
  /// So many channels' sums stay near.
  static constexpr int64_t kChannelsAtOnce = 256;

  std::vector<Runs> runs_of(int64_t begin, int64_t end) const {
    std::vector<Runs> runs;
    runs.reserve(static_cast<size_t>(end - begin));
    for (int64_t channel = begin; channel < end; ++channel) {
      runs.emplace_back(channels_, channel);
    }
    return runs;
  }

  /// Takes all channels of some images, then those of the next ones.
  void in_order_of_memory(int64_t begin, int64_t end) const {
    const int64_t inner = args_.shape.inner;
    const int64_t stride = args_.shape.channels * inner;
    std::vector<Runs> runs = runs_of(begin, end);
    const auto for_channels = [&](int64_t image, const auto& add) {
      BackwardPointers<T> pointers(args_);
      pointers.advance(image * stride + begin * inner);
      for (auto& of_channel : runs) {
        add(of_channel, pointers);
        pointers.advance(inner);
      }
    };
    typename Runs::Offsets offsets;
    for (size_t r = 0; r < offsets.size(); ++r) {
      offsets[r] = static_cast<int64_t>(r) * stride;
    }
    constexpr auto kRuns = static_cast<int64_t>(Runs::kRuns);
    int64_t image = 0;
    for (; image + kRuns <= args_.shape.outer; image += kRuns) {
      for_channels(image, [&](Runs& to, const auto& pointers) { to.add_together(pointers, offsets, inner); });
    }
    for (; image < args_.shape.outer; ++image) {
      for_channels(image, [&](Runs& to, const auto& pointers) { to.add(pointers, inner); });
    }
    for (int64_t channel = begin; channel < end; ++channel) {
      finish_sums(args_, channels_, channel, runs[static_cast<size_t>(channel - begin)].get());
    }
  }

  Sums of_segment(int64_t channel, int64_t segment) const {
    Runs runs(channels_, channel);
    for (int64_t i = pieces_.segment_begin(segment); i < pieces_.segment_begin(segment + 1); ++i) {
      const Piece piece = pieces_[i];
      BackwardPointers<T> pointers(args_);
      pointers.advance(channel * args_.shape.inner + piece.offset);
      runs.add(pointers, piece.n);
    }
    return runs.get();
  }

  const BackwardArgs& args_;
  const Channels<A> channels_;
  const PlanePieces& pieces_;
};

/// Writes dx of whole channels or of their segments.
template <typename T, Mask kMask, bool kStream>
class PlanesInputGradient {
  using A = Accumulate<T>;

 public:
  PlanesInputGradient(const BackwardArgs& args, const PlanePieces& pieces)
      : args_(args), channels_(args), pieces_(pieces) {}

  /// Takes a segment of neighbouring channels. It goes backwards, as the last pieces were read last.
  /// @param sums  those of these channels
  void run(int64_t first, int64_t count, int64_t segment, const GradientSums* sums) const {
    std::vector<PackInputGradient<T>> coefficients;
    coefficients.reserve(static_cast<size_t>(count));
    SharesInOrder<A> shares(channels_);
    for (int64_t k = 0; k < count; ++k) {
      coefficients.emplace_back(channels_, first + k, shares.of(first + k), sums[k]);
    }
    BackwardPointers<T> pointers(args_);
    pointers.advance(first * args_.shape.inner);
    for (int64_t i = pieces_.segment_begin(segment + 1) - 1; i >= pieces_.segment_begin(segment); --i) {
      const Piece piece = pieces_[i];
      BackwardPointers<T> run = pointers;
      run.advance(piece.offset);
      for (const auto& of_channel : coefficients) {
        input_gradient_run<T, kMask, kStream>(run, piece.n, of_channel);
        run.advance(args_.shape.inner);
      }
    }
  }

  /// Takes all segments of all channels.
  void run_segments(const GradientSums* sums) const {
    const int64_t segments = pieces_.segments();
    parallel(args_.parallel_for, args_.shape.channels * segments, args_.shape.values(),
             [&](int64_t begin, int64_t end) {
               for (int64_t task = begin; task < end; ++task) {
                 run(task / segments, 1, task % segments, sums + task / segments);
               }
               if constexpr (kStream) {
                 streaming_done();
               }
             });
  }

 private:
  const BackwardArgs& args_;
  const Channels<A> channels_;
  const PlanePieces& pieces_;
};

/// Tells whether dx and dresidual, where they are, can be streamed to.
template <typename T>
bool can_stream_gradients(const BackwardArgs& args) {
  return args.stream && (!args.dx || can_stream_planes<T>(args.dx, args.shape)) &&
         (!args.dresidual || can_stream_planes<T>(args.dresidual, args.shape));
}

template <typename T>
void planes_backward(const BackwardArgs& args) {
  const PlanePieces pieces(args.shape, sizeof(T));
  with_mask(args, [&](auto mask, auto input) {
    with_flag(can_stream_gradients<T>(args),
              [&](auto stream) { PlanesSums<T, mask(), input(), stream() && kStreams<T>>(args, pieces).run(); });
  });
}

/// Goes channel by channel: the second half reads from the cache what the first has read.
template <bool kStream, typename FirstHalf, typename SecondHalf>
void planes_in_halves(const BackwardArgs& args, const PlanePieces& pieces, const FirstHalf& first_half,
                      const SecondHalf& second_half) {
  const int64_t channels = args.shape.channels;
  if (pieces.segments() > 1) {
    std::vector<GradientSums> sums(static_cast<size_t>(channels));
    first_half.of_segments(
        [&](int64_t channel, const GradientSums& of_channel) { sums[static_cast<size_t>(channel)] = of_channel; });
    return second_half.run_segments(sums.data());
  }
  parallel(args.parallel_for, channels, args.shape.values(), [&](int64_t begin, int64_t end) {
    std::vector<GradientSums> sums(static_cast<size_t>(pieces.group()));
    for (int64_t channel = begin; channel < end; channel += pieces.group()) {
      const int64_t count = std::min(pieces.group(), end - channel);
      first_half.of_channels(channel, count, sums.data());
      second_half.run(channel, count, 0, sums.data());
    }
    if constexpr (kStream) {
      streaming_done();
    }
  });
}

template <typename T>
void planes_backward_through_statistics(const BackwardArgs& args) {
  const PlanePieces pieces(args.shape, sizeof(T), /*arrays=*/2);
  const BackwardArgs first = first_half(args);
  const BackwardArgs second = second_half(args);
  const bool streams = args.stream && can_stream_planes<T>(args.dx, args.shape);
  with_halves(first, second, [&](auto mask, auto left) {
    with_flag(streams, [&](auto stream) {
      constexpr bool kStream = stream() && kStreams<T>;
      using First = PlanesSums<T, mask(), true, false>;
      using Second = PlanesInputGradient<T, left(), kStream>;
      planes_in_halves<kStream>(args, pieces, First(first, pieces), Second(second, pieces));
    });
  });
}

/// Writes dx from the sums that are given.
template <typename T>
void planes_gradient_of_input(const BackwardArgs& args) {
  const PlanePieces pieces(args.shape, sizeof(T));
  const BackwardArgs second = second_half(args);
  const int64_t channels = args.shape.channels;
  std::vector<GradientSums> sums;
  sums.reserve(static_cast<size_t>(channels));
  for (int64_t c = 0; c < channels; ++c) {
    sums.push_back({args.sums[c], args.sums[channels + c]});
  }
  const bool streams = args.stream && can_stream_planes<T>(args.dx, args.shape);
  with_input_mask(second, [&](auto mask) {
    with_flag(streams, [&](auto stream) {
      constexpr bool kStream = stream() && kStreams<T>;
      PlanesInputGradient<T, mask(), kStream>(second, pieces).run_segments(sums.data());
    });
  });
}

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
