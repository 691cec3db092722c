// How the kernels are launched, on the devices that there are.

#include "kernels/cuda/launch.h"

#include "buffer.h"
#include "devices.h"
#include "inputs.h"
#include "ways.h"

#include <algorithm>

namespace momentum_bn::kernels::cuda::test {
namespace {

using kernels::test::layouts;
using kernels::test::name_of;
using kernels::test::size_of;
using kernels::test::sizes;

constexpr int64_t kMostTiles = 2'147'483'647;
constexpr int64_t kMostSlices = 65'535;
constexpr int kMostThreads = 1024;

/// The test shapes, a network's layers in both memory formats, and extremes.
std::vector<Shape> shapes() {
  auto all = sizes();
  all.insert(all.end(), layouts().begin(), layouts().end());
  for (const int64_t batch : {1, 32, 256}) {
    for (const auto& [channels, side] :
         {std::pair<int64_t, int64_t>{64, 112}, {64, 56}, {256, 56}, {512, 28}, {1024, 14}, {2048, 7}, {3, 224}}) {
      all.push_back({batch, channels, side * side});
      all.push_back({batch * side * side, channels, 1});
    }
  }
  for (const int64_t rows : {2, 4096, 65'536}) {
    all.push_back({rows, 4096, 1});
  }
  for (const Shape& extreme :
       {Shape{1, 1, int64_t{1} << 33}, Shape{int64_t{1} << 33, 1, 1}, Shape{int64_t{1} << 31, 8, 1},
        Shape{2, 3'000'000, 4}, Shape{2, 3'000'000, 1}, Shape{1'000'000, 2, 3}}) {
    all.push_back(extreme);
  }
  return all;
}

/// run(type, shape, vector, device) for all there are.
template <typename Run>
void for_all(const Run& run) {
  for (const auto& [name, device] : real_devices()) {
    for (const Type type : {Type::kFloat, Type::kDouble, Type::kBFloat16, Type::kHalf}) {
      for (const Shape& shape : shapes()) {
        for (int vector = vector_of(type, shape, {}); vector > 0; vector /= 2) {
          SCOPED_TRACE(name + " " + kernels::test::name_of(type) + " " + name_of(shape) + " by " +
                       std::to_string(vector));
          run(type, shape, vector, device);
        }
      }
    }
  }
}

/// run(kept, type, shape, vector, device): the same forward and backward.
template <typename Run>
void for_all_kept(const Run& run) {
  for (const int kept : {kKeptForward, kKeptBackward}) {
    for_all([&](Type type, const Shape& shape, int vector, const Device& device) {
      run(kept, type, shape, vector, device);
    });
  }
}

/// Where the first value of a vector lies.
int64_t address_of(const Tiling& tiling, int64_t column, int64_t position) {
  if (tiling.rows) {
    return position * tiling.channels + column * tiling.vector;
  }
  return (position / tiling.plane * tiling.channels + column) * tiling.inner + position % tiling.plane * tiling.vector;
}

void expect_everything_is_covered(const Tiling& tiling, const Shape& shape) {
  EXPECT_EQ(tiling.columns * tiling.positions * tiling.vector, shape.values());
  EXPECT_GE(tiling.tiles * tiling.width, tiling.columns);
  EXPECT_LT((tiling.tiles - 1) * tiling.width, tiling.columns) << "a tile of nothing";
  EXPECT_GE(tiling.slices * tiling.positions_per_slice, tiling.positions);
  EXPECT_LT((tiling.slices - 1) * tiling.positions_per_slice, tiling.positions) << "a slice of nothing";
  EXPECT_EQ(tiling.channels_per_tile, tiling.width * (tiling.rows ? tiling.vector : 1));
}

/// A thread that goes on by `height` positions comes where it should.
void expect_right_steps(const Tiling& tiling) {
  for (const int64_t from : {int64_t{0}, tiling.positions / 3, tiling.positions - tiling.height - 1}) {
    if (from < 0 || from + tiling.height >= tiling.positions) {
      continue;
    }
    int64_t at = address_of(tiling, 0, from) + tiling.step;
    if (!tiling.rows && from % tiling.plane + tiling.step_in_plane >= tiling.plane) {
      at += tiling.skip;
    }
    EXPECT_EQ(at, address_of(tiling, 0, from + tiling.height));
  }
}

void expect_within_limits(const Tiling& tiling) {
  EXPECT_LE(tiling.tiles, kMostTiles);
  EXPECT_LE(tiling.slices, kMostSlices);
  EXPECT_LE(tiling.threads(), kMostThreads);
  EXPECT_GE(tiling.threads(), 1);
}

TEST(CudaLaunchTest, TilingsCoverAllValuesWithinLimits) {
  for_all([](Type, const Shape& shape, int vector, const Device& device) {
    const auto tiling = tiling_of(shape, vector, device);
    expect_everything_is_covered(tiling, shape);
    expect_right_steps(tiling);
    expect_within_limits(tiling);
    EXPECT_LE(tiling.threads(), kThreads);
    EXPECT_LE(sums_bytes(tiling), 48 * 1024);
    EXPECT_TRUE(tiling.slices == 1 || tiling.tiles < kCounters) << "no counter for every tile";
  });
}

/// One block adds up the sums of all slices of a tile: a layer with much to read has no tile of many channels.
TEST(CudaLaunchTest, TilesOfRowsAreLinesOfTheMemory) {
  for_all([](Type type, const Shape& shape, int vector, const Device& device) {
    const auto tiling = tiling_of(shape, vector, device);
    if (!tiling.rows) {
      return;
    }
    EXPECT_LE(tiling.channels_per_tile, 64);
    constexpr int64_t kLine = 128;
    const auto size = static_cast<int64_t>(size_of(type));
    const bool are_vectors = vector * size >= 8;
    EXPECT_TRUE(!are_vectors || tiling.tiles == 1 || 2 * tiling.channels_per_tile * size > kLine);
  });
}

TEST(CudaLaunchTest, WhatOverflowsTheCache) {
  const auto& devices = real_devices();
  const auto h100 =
      std::find_if(devices.begin(), devices.end(), [](const auto& device) { return device.name == "H100"; });
  ASSERT_NE(h100, devices.end());
  EXPECT_TRUE(overflows_cache(Type::kBFloat16, {64, 256, 56 * 56}, h100->device));
  EXPECT_FALSE(overflows_cache(Type::kBFloat16, {64, 512, 14 * 14}, h100->device));
}

/// As many blocks as the multiprocessors hold at a time, unless there is too little work for them.
TEST(CudaLaunchTest, BlocksFillTheDevice) {
  for_all([](Type, const Shape& shape, int vector, const Device& device) {
    const auto tiling = tiling_of(shape, vector, device);
    const int64_t threads = tiling.blocks() * tiling.threads();
    const int64_t vectors = tiling.columns * tiling.positions;
    const int64_t resident = int64_t{device.multiprocessors} * device.threads_per_multiprocessor;
    const bool is_much = tiling.tiles < kCounters && vectors > 16 * resident;
    EXPECT_TRUE(!is_much || 3 * threads >= resident);
    EXPECT_TRUE(tiling.slices == 1 || vectors / threads >= kBatch / 2) << "blocks too small";
  });
}

TEST(CudaLaunchTest, OnChipTilingsCoverAllValuesWithinLimits) {
  int found = 0;
  for_all_kept([&](int kept, Type type, const Shape& shape, int vector, const Device& device) {
    const auto tiling = on_chip_tiling_of(type, shape, vector, device, kept);
    if (!tiling) {
      return;
    }
    ++found;
    expect_everything_is_covered(*tiling, shape);
    expect_right_steps(*tiling);
    expect_within_limits(*tiling);
    EXPECT_LE(tiling->threads(), kOnChipThreads);
    const auto memory = on_chip_memory_of(type, *tiling, kept);
    EXPECT_LE(memory.bytes, device.shared_memory_per_block);
    EXPECT_GE(memory.sums, sums_bytes(*tiling));
    EXPECT_EQ(memory.values % 16, 0);
    const int64_t slots = (tiling->positions_per_slice + tiling->height - 1) / tiling->height * tiling->threads();
    EXPECT_EQ(memory.values_bytes, slots * vector * static_cast<int64_t>(size_of(type)));
    EXPECT_EQ(memory.bytes - memory.values, kept * memory.values_bytes);
    EXPECT_GE(memory.values - memory.moments,
              tiling->channels_per_tile * kGradientNumbers * static_cast<int64_t>(sizeof(double)));
    const bool clusters = device.capability >= 90;
    EXPECT_LE(tiling->slices, clusters ? 8 : 1);
    EXPECT_EQ(tiling->slices & (tiling->slices - 1), 0) << "clusters are powers of 2";
  });
  EXPECT_GT(found, 1000);
}

/// Whenever a channel, or a memory sector's width of channels, fits: in a block, or in eight where there are clusters.
TEST(CudaLaunchTest, OnChipWheneverItFits) {
  constexpr int64_t kSector = 32;
  // What the sums of a block take, at most, and vectors that not all threads have.
  constexpr int64_t kSums = 28 * 1024;
  for_all_kept([&](int kept, Type type, const Shape& shape, int vector, const Device& device) {
    const auto size = static_cast<int64_t>(size_of(type));
    const bool rows = shape.inner == 1 && shape.channels > 1;
    const int64_t channel_bytes = kept * shape.values_per_channel() * size;
    const int64_t tile_bytes = rows ? channel_bytes * std::min(shape.channels, kSector / size) : channel_bytes;
    const int64_t blocks = device.capability >= 90 ? 8 : 1;
    const bool is_on_chip = on_chip_tiling_of(type, shape, vector, device, kept).has_value();
    const bool fits = tile_bytes <= blocks * (device.shared_memory_per_block - kSums);
    const bool is_too_large = tile_bytes > blocks * device.shared_memory_per_block;
    EXPECT_TRUE(!fits || is_on_chip);
    EXPECT_TRUE(!is_too_large || !is_on_chip);
  });
}

TEST(CudaLaunchTest, LayersThatFitFillTheDevice) {
  for (const auto& [name, device] : real_devices()) {
    if (device.capability < 90) {
      continue;
    }
    for (const Shape& shape : {Shape{32, 2048, 49}, Shape{32, 1024, 196}, Shape{32, 512, 784}, Shape{1568, 2048, 1}}) {
      const auto tiling =
          on_chip_tiling_of(Type::kBFloat16, shape, vector_of(Type::kBFloat16, shape, {}), device, kKeptForward);
      ASSERT_TRUE(tiling.has_value()) << name << name_of(shape);
      EXPECT_GE(tiling->blocks(), device.multiprocessors) << name << name_of(shape);
    }
  }
}

TEST(CudaLaunchTest, VectorsWhereSizesAndAddressesAllow) {
  alignas(16) static unsigned char memory[64];
  const Shape planes = {2, 3, 16};
  const Shape rows = {7, 24, 1};
  for (const Shape& shape : {planes, rows}) {
    EXPECT_EQ(vector_of(Type::kFloat, shape, {memory, nullptr}), 4);
    EXPECT_EQ(vector_of(Type::kDouble, shape, {memory}), 2);
    EXPECT_EQ(vector_of(Type::kBFloat16, shape, {memory + 16}), 8);
    EXPECT_EQ(vector_of(Type::kHalf, shape, {memory, memory + 8}), 4);
    EXPECT_EQ(vector_of(Type::kHalf, shape, {memory, memory + 4}), 1);
    EXPECT_EQ(vector_of(Type::kDouble, shape, {memory + 8}), 1);
    EXPECT_EQ(vector_of(Type::kFloat, shape, {memory + 4}), 1);
  }
  EXPECT_EQ(vector_of(Type::kFloat, {4, 4, 49}, {memory}), 1);
  EXPECT_EQ(vector_of(Type::kBFloat16, {4, 4, 196}, {memory}), 4);
  EXPECT_EQ(vector_of(Type::kBFloat16, {4, 4, 49}, {memory}), 1);
  EXPECT_EQ(vector_of(Type::kFloat, {4, 5, 1}, {memory}), 1);
  EXPECT_EQ(vector_of(Type::kFloat, {4, 1, 1}, {memory}), 4);
  EXPECT_EQ(backward_vector_of(Type::kBFloat16, rows, {memory}), 4);
  EXPECT_EQ(backward_vector_of(Type::kBFloat16, planes, {memory}), 8);
  EXPECT_EQ(backward_vector_of(Type::kDouble, rows, {memory}), 2);
  EXPECT_EQ(backward_vector_of(Type::kHalf, {4, 1, 8}, {memory}), 8) << "a single channel is a plane";
}

/// Code compiled for devices without clusters has none, on whatever device it runs.
TEST(CudaLaunchTest, CurrentDevice) {
  Device device = {};
  ASSERT_EQ(current_device(device), 0);
  EXPECT_EQ(device.multiprocessors, 132);
  EXPECT_EQ(device.capability, 89);
  EXPECT_EQ(device.threads_per_multiprocessor, 2048);
  EXPECT_EQ(device.shared_memory_per_block, 227 * 1024);
  EXPECT_EQ(device.shared_memory_per_multiprocessor, 228 * 1024);
  EXPECT_EQ(device.l2_bytes, 50 * 1024 * 1024);
}

/// The devices of the other tests send their shapes the ways that they are named for.
TEST(CudaLaunchTest, WaysOfTheTests) {
  for (const int kept : {kKeptForward, kKeptBackward}) {
    int in_block = 0;
    int in_cluster = 0;
    for (const Shape& shape : layouts()) {
      const auto tiling_on = [&](size_t way) {
        return on_chip_tiling_of(Type::kFloat, shape, vector_of(Type::kFloat, shape, {}), forward_ways()[way].device,
                                 kept);
      };
      EXPECT_FALSE(tiling_on(0).has_value());
      if (tiling_on(1)) {
        ++in_block;
      }
      const auto tiling = tiling_on(2);
      if (tiling && tiling->slices > 1) {
        ++in_cluster;
      }
    }
    EXPECT_GE(in_block, kept == kKeptForward ? 10 : 9);
    EXPECT_GE(in_cluster, kept == kKeptForward ? 4 : 3);
  }
}

}  // namespace
}  // namespace momentum_bn::kernels::cuda::test
