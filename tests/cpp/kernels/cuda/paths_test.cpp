// Which of their ways the kernels go, and what becomes of errors on them.

#include "devices.h"
#include "emulator.h"
#include "kernels/cuda/kernels.h"

#include <gtest/gtest.h>

#include <array>
#include <vector>

namespace momentum_bn::kernels::cuda::test {
namespace {

constexpr int kLaunchFailure = 719;
constexpr int kNotSupported = 801;

/// A forward or backward pass of a few values, which fit in a block or in a cluster, or do not, as the device is.
class CudaPathsTest : public testing::Test {
 protected:
  void TearDown() override {
    use_paths(Paths::kBest);
    emulator::refuse_clusters(false);
  }

  int run_forward(const Device& device) {
    ForwardArgs args = {};
    args.shape = {4, 2, 784};
    args.x = args.y = values_.data();
    args.saved = channels_.data();
    args.through_statistics = true;
    args.options.eps = 1e-5;
    args.workspace = workspace_of(forward_workspace_bytes(args.type, args.shape, device));
    args.counters = counters_.data();
    return forward(args, device);
  }

  int run_backward(const Device& device) {
    BackwardArgs args = {};
    args.shape = {4, 2, 784};
    args.dy = args.dx = values_.data();
    args.x = x_.data();
    args.saved = channels_.data();
    args.through_statistics = true;
    args.workspace = workspace_of(backward_workspace_bytes(args.type, args.shape, device));
    args.counters = counters_.data();
    return backward(args, device);
  }

  /// Runs both, and tells which ways they went.
  PathCounts run_both(const Device& device) {
    const auto before = path_counts();
    EXPECT_EQ(run_forward(device), 0);
    EXPECT_EQ(run_backward(device), 0);
    const auto after = path_counts();
    return {after.on_chip - before.on_chip, after.several_launches - before.several_launches};
  }

  void expect_refused(const Device& device) {
    const auto before = emulator::launches();
    EXPECT_EQ(run_forward(device), kNotSupported);
    EXPECT_EQ(run_backward(device), kNotSupported);
    EXPECT_EQ(emulator::launches(), before);
  }

  const Device too_small_ = small_device(75, 0);
  const Device in_block_ = small_device(75, 240);
  const Device in_cluster_ = small_device(90, 28);

 private:
  void* workspace_of(size_t bytes) {
    workspace_.resize(bytes / sizeof(double) + 1);
    return workspace_.data();
  }

  std::vector<float> values_ = std::vector<float>(4 * 2 * 784, 1);
  std::vector<float> x_ = std::vector<float>(4 * 2 * 784, 1);
  std::array<float, 12> channels_ = {};
  std::vector<double> workspace_;
  std::vector<unsigned> counters_ = std::vector<unsigned>(kCounters);
};

TEST_F(CudaPathsTest, TheBestOneByItself) {
  EXPECT_EQ(run_both(too_small_).several_launches, 2);
  EXPECT_EQ(run_both(in_block_).on_chip, 2);
  EXPECT_EQ(run_both(in_cluster_).on_chip, 2);
  emulator::refuse_clusters(true);
  EXPECT_EQ(run_both(in_cluster_).several_launches, 2);
}

TEST_F(CudaPathsTest, SeveralLaunchesWhereTheyAreAskedFor) {
  use_paths(Paths::kSeveralLaunches);
  for (const auto& device : {too_small_, in_block_, in_cluster_}) {
    EXPECT_EQ(run_both(device).several_launches, 2);
  }
}

TEST_F(CudaPathsTest, OnChipWhereItIsAskedForOrNotAtAll) {
  use_paths(Paths::kOnChip);
  EXPECT_EQ(run_both(in_block_).on_chip, 2);
  EXPECT_EQ(run_both(in_cluster_).on_chip, 2);
  expect_refused(too_small_);
  emulator::refuse_clusters(true);
  expect_refused(in_cluster_);
}

/// Clusters alone are given up for another way: other errors are told.
TEST_F(CudaPathsTest, ErrorsAreTold) {
  for (const auto& device : {too_small_, in_block_, in_cluster_}) {
    emulator::fail_next_launch(kLaunchFailure);
    EXPECT_EQ(run_forward(device), kLaunchFailure);
    emulator::fail_next_launch(kLaunchFailure);
    EXPECT_EQ(run_backward(device), kLaunchFailure);
  }
}

}  // namespace
}  // namespace momentum_bn::kernels::cuda::test
