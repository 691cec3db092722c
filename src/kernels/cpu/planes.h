#pragma once

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/moments.h"
#include "kernels/cpu/normalize_run.h"
#include "kernels/cpu/parallel.h"

#include <memory>

// [outer][channels][inner] with long planes. One channel at a time, so that its second read comes from the cache. Where
// there are few channels each is split into a number of segments that depends on the shape alone, merged in order: the
// same bits for any number of threads.

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// A plane is summed in equal chunks of at most this many values: they stay in the first-level cache, and few enough
/// are added up in one register lane.
constexpr int64_t kChunk = 4096;
/// From so many channels on, a channel is a task of its own.
constexpr int64_t kEnoughChannels = 32;

/// The chunks of one channel, counted through all its planes.
struct PlaneChunks {
  explicit PlaneChunks(const Shape& s)
      : shape(s), per_plane(divide_up(s.inner, kChunk)), size(divide_up(divide_up(s.inner, per_plane), 64) * 64) {
    per_plane = divide_up(s.inner, size);
    const int64_t chunks = s.outer * per_plane;
    segments = s.channels >= kEnoughChannels ? 1 : std::min(chunks, divide_up(2 * kEnoughChannels, s.channels));
  }

  /// run(offset of the chunk's first value, its size, position of the chunk's plane) for the chunks of one segment.
  template <typename Run>
  void for_segment(int64_t channel, int64_t segment, const Run& run) const {
    const int64_t chunks = shape.outer * per_plane;
    for (int64_t i = chunks * segment / segments; i < chunks * (segment + 1) / segments; ++i) {
      const int64_t plane = i / per_plane;
      const int64_t begin = (i % per_plane) * size;
      run((plane * shape.channels + channel) * shape.inner + begin, std::min(size, shape.inner - begin), plane);
    }
  }

  Shape shape;
  int64_t per_plane;
  int64_t size;
  int64_t segments;
};

template <typename T>
Moments segment_moments(const PlaneChunks& chunks, const T* x, int64_t channel, int64_t segment) {
  const int64_t next_plane = chunks.shape.channels * chunks.shape.inner;
  Moments moments;
  chunks.for_segment(channel, segment, [&](int64_t offset, int64_t n, int64_t plane) {
    add_chunk(moments, x + offset, n, plane + 1 < chunks.shape.outer ? x + offset + next_plane : nullptr);
  });
  return moments;
}

template <typename T, bool kResidual, bool kRelu>
void normalize_segment(const PlaneChunks& chunks, const ForwardArgs& args, int64_t channel, int64_t segment) {
  using A = Accumulate<T>;
  using Source = OneChannel<T>;
  const auto* x = static_cast<const T*>(args.x);
  const auto* residual = static_cast<const T*>(args.residual);
  auto* y = static_cast<T*>(args.y);
  const Coefficients<Source> coefficients = {Source(static_cast<const A*>(args.center)[channel]),
                                             Source(static_cast<const A*>(args.scale)[channel]),
                                             Source(static_cast<const A*>(args.shift)[channel])};
  // The next channel's values, for its statistics.
  const bool last = channel + 1 == args.shape.channels;
  chunks.for_segment(channel, segment, [&](int64_t offset, int64_t n, int64_t) {
    normalize_run<T, kResidual, kRelu>(x + offset, kResidual ? residual + offset : nullptr, y + offset, n, coefficients,
                                       last ? nullptr : x + offset + args.shape.inner);
  });
}

template <typename T>
void planes_forward(const ForwardArgs& args, bool with_statistics) {
  const PlaneChunks chunks(args.shape);
  const int64_t channels = args.shape.channels;
  const int64_t segments = chunks.segments;
  const auto* x = static_cast<const T*>(args.x);

  const auto finish = [&](int64_t channel, const Moments& moments) {
    args.mean[channel] = moments.mean;
    args.m2[channel] = moments.m2;
    args.blend(args.blend_context, channel, channel + 1);
  };
  if (with_statistics && segments > 1) {
    const std::unique_ptr<Moments[]> parts(new Moments[static_cast<size_t>(channels * segments)]);
    parallel(args.parallel_for, channels * segments, args.shape.values(), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        parts[static_cast<size_t>(task)] = segment_moments(chunks, x, task / segments, task % segments);
      }
    });
    for (int64_t channel = 0; channel < channels; ++channel) {
      Moments moments;
      for (int64_t s = 0; s < segments; ++s) merge(moments, parts[static_cast<size_t>(channel * segments + s)]);
      finish(channel, moments);
    }
  }
  const bool statistics_here = with_statistics && segments == 1;
  with_flags(args.residual != nullptr, args.relu, [&](auto residual, auto relu) {
    parallel(args.parallel_for, channels * segments, args.shape.values(), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t channel = task / segments;
        if (statistics_here) finish(channel, segment_moments(chunks, x, channel, 0));
        normalize_segment<T, residual(), relu()>(chunks, args, channel, task % segments);
      }
    });
  });
}

template <typename T>
Sums backward_segment(const PlaneChunks& chunks, const BackwardArgs& args, int64_t channel, int64_t segment) {
  using A = Accumulate<T>;
  using P = Pack<T>;
  const BackwardRun<T> all = {static_cast<const T*>(args.dy), static_cast<const T*>(args.x),
                              static_cast<const T*>(args.y), static_cast<T*>(args.dx), static_cast<T*>(args.dresidual)};
  const OneChannel<T> scale(static_cast<const A*>(args.scale)[channel]);
  const OneChannel<T> center(static_cast<const A*>(args.center)[channel]);
  Sums sums = {0, 0};
  chunks.for_segment(channel, segment, [&](int64_t offset, int64_t n, int64_t) {
    P g[kLanes] = {P::all(0), P::all(0), P::all(0), P::all(0)};
    P gx[kLanes] = {P::all(0), P::all(0), P::all(0), P::all(0)};
    backward_run(all.from(offset), n, scale, center, [&](int lane, int64_t, const P& g_here, const P& gx_here) {
      g[lane] = g[lane] + g_here;
      gx[lane] = gx[lane] + gx_here;
    });
    sums.first += sum_of_packs(g);
    sums.second += sum_of_packs(gx);
  });
  return sums;
}

template <typename T>
void planes_backward(const BackwardArgs& args) {
  const PlaneChunks chunks(args.shape);
  const int64_t segments = chunks.segments;
  const int64_t tasks = args.shape.channels * segments;
  const std::unique_ptr<Sums[]> parts(new Sums[static_cast<size_t>(tasks)]);
  parallel(args.parallel_for, tasks, args.shape.values(), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      parts[static_cast<size_t>(task)] = backward_segment<T>(chunks, args, task / segments, task % segments);
    }
  });
  for (int64_t channel = 0; channel < args.shape.channels; ++channel) {
    args.sum_g[channel] = 0;
    args.sum_gx[channel] = 0;
    for (int64_t s = 0; s < segments; ++s) {
      const Sums& part = parts[static_cast<size_t>(channel * segments + s)];
      args.sum_g[channel] += part.first;
      args.sum_gx[channel] += part.second;
    }
  }
}

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
