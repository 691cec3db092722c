#pragma once

#include "kernels/cpu/simd/parallel.h"
#include "kernels/shape.h"

#include <algorithm>
#include <array>

// This folder handles [outer][channels][inner] with long planes. It takes a group of channels at a time, so that its
// second read comes from the cache. A channel is read in several places at once, each in the order of memory: faster
// than in one. Where there are few channels each is split into a number of segments that depends on the shape alone,
// merged in order: the same bits for any number of threads.

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
  /// @param arrays  the number of arrays of values that are read twice
  PlanePieces(const Shape& shape, int64_t element_size, int64_t arrays = 1)
      : stride_(shape.channels * shape.inner), inner_(shape.inner), per_plane_(1) {
    const int64_t channel_bytes = shape.values_per_channel() * element_size * arrays;
    group_ = std::clamp<int64_t>(kGroupBytes / channel_bytes, 1, kEnoughChannels / 4);
    // Pieces are whole cache lines.
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
      if (n[r] > shortest) {
        alone(offsets[r] + shortest, n[r] - shortest);
      }
    }
  }
  for (; i < end; ++i) {
    alone(pieces[i].offset, pieces[i].n);
  }
}

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
