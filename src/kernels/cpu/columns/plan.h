#pragma once

#include "kernels/cpu/simd/pack.h"
#include "kernels/cpu/simd/parallel.h"
#include "kernels/shape.h"

#include <algorithm>
#include <numeric>

// This folder handles [outer][channels][inner] with short planes or none: rows of channels * inner columns, each column
// part of one channel. Where a block of columns fits the cache over all rows, blocks are tasks and a block's second
// read comes from the cache. Otherwise segments of rows are tasks; their number depends on the shape alone and they are
// added up in order: the same bits for any number of threads.

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// So many rows are added up in registers before their sums go to the accumulators. Rows that come from memory are
/// taken from so many places at once, each read in order: faster than in one.
constexpr int64_t kRowsAtOnce = 8;
/// So many rows are normalised, or taken backward, together: their columns' coefficients are read once.
constexpr int64_t kRowsTogether = 4;
/// A segment has at least so many rows.
constexpr int64_t kSegmentRows = 64;
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
/// Values are asked for this many bytes in advance, over all places.
constexpr int64_t kAheadBytes = int64_t{8} * 1024;

/// A block of channels over a range of rows.
struct Tile {
  int64_t channel_begin;
  int64_t channel_end;
  int64_t row_begin;
  int64_t row_end;

  int64_t channels() const { return channel_end - channel_begin; }
  int64_t rows() const { return row_end - row_begin; }
};

struct ColumnPlan {
  /// @param arrays  of values that are read twice: 1 or 2
  ColumnPlan(const Shape& s, int64_t element_size, int64_t arrays = 1)
      : shape(s), rows(s.outer), columns(s.channels * s.inner), channels_per_block(s.channels) {
    // Blocks begin and end with full vectors.
    const int64_t aligned = kAlignedColumns / arrays;
    const int64_t step = aligned / std::gcd(aligned, s.inner);
    const int64_t channels = std::min(divide_up(divide_up(kBlockColumns / arrays, s.inner), step) * step, s.channels);
    const bool fits = rows * channels * s.inner * element_size * arrays <= kBlockBytes;
    if (fits && s.channels >= 4 * channels) {
      channels_per_block = channels;
      blocks = divide_up(s.channels, channels);
      return;
    }
    segments = std::clamp<int64_t>(std::min(s.values() / kSegmentValues, rows / kSegmentRows), 1, kMostSegments);
    far = s.values() * element_size >= kBeyondCaches;
    ahead = kAheadBytes / element_size;
  }

  /// Segments begin at whole groups of rows, so that inputs whose sums are exact stay so.
  int64_t segment_begin(int64_t segment) const {
    return segment == segments ? rows : rows * segment / segments / kRowsAtOnce * kRowsAtOnce;
  }
  int64_t block_begin(int64_t block) const { return block * channels_per_block; }
  int64_t block_end(int64_t block) const { return std::min(shape.channels, (block + 1) * channels_per_block); }

  Tile tile_of_block(int64_t block) const { return {block_begin(block), block_end(block), 0, rows}; }
  Tile tile_of_segment(int64_t segment) const {
    return {0, shape.channels, segment_begin(segment), segment_begin(segment + 1)};
  }

  Shape shape;
  int64_t rows;
  int64_t columns;  // of a row, which is also its stride
  int64_t channels_per_block;
  int64_t blocks = 1;
  int64_t segments = 1;
  bool far = false;   // rows follow each other and come from memory
  int64_t ahead = 0;  // values that are then asked for in advance, over all places
};

/// The order in which a tile's rows are gone through: `together` of them at a time, `apart` rows from one to the next.
struct RowOrder {
  /// Rows that are far come from `together` places at once; others are neighbouring rows.
  RowOrder(bool far, int64_t rows, int64_t together)
      : steps(rows / together), apart(far ? steps : 1), next(far ? 1 : together), rest(steps * together) {}

  int64_t steps;
  int64_t apart;
  int64_t next;  // rows from one step to the next
  int64_t rest;  // the first row that no step takes
};

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
