// What the CUDA kernels make of the state, forward after forward.

#include "buffer.h"
#include "compare.h"
#include "inputs.h"
#include "layer.h"
#include "ways.h"

#include <cmath>
#include <optional>

namespace momentum_bn::kernels::cuda::test {
namespace {

using kernels::test::accumulate_type;
using kernels::test::near;
using kernels::test::rounded;
using kernels::test::unit_noise;
using kernels::test::unit_tolerance;

class CudaStateTest : public EveryWay {
 protected:
  ForwardCall call_of(const Shape& shape, uint64_t seed) const {
    ForwardCall call;
    call.type = type();
    call.shape = shape;
    call.x = rounded(type(), unit_noise(shape.values(), seed));
    return call;
  }

  void expect_same(const LayerState& state, const LayerState& expected) const {
    const Type kept = accumulate_type(type());
    EXPECT_TRUE(near(kept, state.running_mean, expected.running_mean, unit_tolerance(type()))) << "running_mean";
    EXPECT_TRUE(near(kept, state.running_var, expected.running_var, 4 * unit_tolerance(type()))) << "running_var";
    EXPECT_TRUE(near(kept, state.view_mean_sum, expected.view_mean_sum, 2 * unit_tolerance(type()))) << "view_mean_sum";
    EXPECT_TRUE(near(kept, state.view_var_sum, expected.view_var_sum, 8 * unit_tolerance(type()))) << "view_var_sum";
    EXPECT_EQ(state.num_batches_tracked, expected.num_batches_tracked);
    EXPECT_EQ(state.view_count, expected.view_count);
    EXPECT_EQ(state.cur_iter, expected.cur_iter);
    EXPECT_NEAR(state.momentum, expected.momentum, state.momentum_is_float ? 1e-7 : 1e-15);
  }

  /// Seven forwards, the schedule's end among them.
  void check_forwards(const Shape& shape, LayerState state, const BlendOptions& blend,
                      std::optional<double> update_momentum = {}) const {
    auto expected = state;
    for (uint64_t step = 0; step < 7; ++step) {
      auto call = call_of(shape, 100 + step);
      call.options = blend;
      call.update_momentum = update_momentum;
      emulator::set_order(step);
      SCOPED_TRACE(kernels::test::name_of(shape) + " forward " + std::to_string(step));
      const auto result = run_forward(call, state, device());
      const auto exact = expected_forward(call, expected);
      EXPECT_TRUE(near(type(), result.y, exact.y, 4 * unit_tolerance(type()))) << "y";
      expect_same(state, expected);
    }
  }

  const std::vector<Shape> shapes_ = {{16, 5, 7}, {4, 8, 64}, {301, 37, 1}, {64, 40, 1}, {2, 3, 3137}};
};

TEST_P(CudaStateTest, ViewsPerUpdate) {
  constexpr Variance kVariances[] = {Variance::Published, Variance::Unbiased, Variance::Biased};
  for (const int64_t views : {1, 2, 3}) {
    for (const Shape& shape : shapes_) {
      check_forwards(shape, LayerState::used(type(), shape.channels), {1e-5, 6, views, true, kVariances[views % 3]});
    }
  }
}

TEST_P(CudaStateTest, ConstantSchedule) {
  for (const Shape& shape : shapes_) {
    check_forwards(shape, LayerState::used(type(), shape.channels), {1e-5, 6, 2, false, Variance::Published});
  }
}

TEST_P(CudaStateTest, CumulativeAverage) {
  for (const Shape& shape : shapes_) {
    auto state = LayerState::used(type(), shape.channels);
    state.momentum = -1;
    state.cur_iter = 0;
    for (const bool cosine : {false, true}) {
      check_forwards(shape, state, {1e-5, 6, 2, cosine, Variance::Unbiased});
    }
  }
}

TEST_P(CudaStateTest, BatchNorm) {
  for (const Shape& shape : shapes_) {
    const auto state = LayerState::used_batch_norm(type(), shape.channels);
    for (const std::optional<double> momentum : {std::optional(0.1), std::optional(0.0), std::optional(1.0), {}}) {
      check_forwards(shape, state, {1e-5, 6, 2, true, Variance::Biased}, momentum);
    }
    auto fresh = state;
    fresh.num_batches_tracked = 0;
    check_forwards(shape, fresh, {1e-5, 6, 2, true, Variance::Biased});
  }
}

TEST_P(CudaStateTest, MomentumInFloat) {
  for (const Shape& shape : shapes_) {
    auto state = LayerState::used(type(), shape.channels);
    state.momentum_is_float = true;
    state.momentum = 0.5;
    check_forwards(shape, state, {1e-5, 9, 2, true, Variance::Published});
  }
}

/// Many tiles, all of them done before the scalars move.
TEST_P(CudaStateTest, ManyChannels) {
  for (const Shape& shape : {Shape{3, 5000, 1}, Shape{2, 4500, 4}}) {
    check_forwards(shape, LayerState::used(type(), shape.channels), {1e-2, 6, 2, true, Variance::Published});
  }
}

TEST_P(CudaStateTest, GatheredUpdates) {
  const Shape shape = {4, 300, 3};
  auto state = LayerState::used(type(), shape.channels);
  auto expected = state;
  for (uint64_t step = 0; step < 4; ++step) {
    auto call = call_of(shape, 100 + step);
    const bool none_here = step == 3;
    call.ranks = 2;
    for (int rank = 0; rank < 2; ++rank) {
      const auto more =
          expected_statistics(shape, unit_noise(shape.values(), 200 + 2 * step + static_cast<uint64_t>(rank)));
      call.gathered.insert(call.gathered.end(), more.begin(), more.end());
    }
    if (none_here) {
      call.shape = {0, shape.channels, 1};
      call.x.clear();
    }
    run_forward(call, state, device());
    expected_forward(call, expected);
    expect_same(state, expected);
  }
}

TEST_P(CudaStateTest, GroupWithoutAnyValueChangesNothing) {
  const int64_t channels = 300;
  auto state = LayerState::used(type(), channels);
  const auto before = state;
  ForwardCall call;
  call.type = type();
  call.shape = {0, channels, 1};
  call.ranks = 2;
  call.gathered.assign(static_cast<size_t>(2 * (2 * channels + 1)), 0);
  call.through_statistics = true;
  const auto result = run_forward(call, state, device());
  EXPECT_EQ(result.saved, std::vector<double>(static_cast<size_t>(6 * channels), 0));
  expect_same(state, before);
  EXPECT_EQ(state.running_mean, before.running_mean);
}

MOMENTUM_BN_FOR_WAYS(CudaStateTest, forward_ways());

TEST(CudaScheduleTest, Advances) {
  for (const bool is_float : {false, true}) {
    int64_t cur_iter = 0;
    double momentum = 1;
    auto float_momentum = 1.0F;
    for (int step = 1; step <= 12; ++step) {
      void* memory = is_float ? static_cast<void*>(&float_momentum) : &momentum;
      ASSERT_EQ(advance_schedule(&cur_iter, memory, is_float, 10, true, nullptr), 0);
      EXPECT_EQ(cur_iter, step);
      const double expected = step < 10 ? (std::cos(M_PI * step / 10) + 1) / 2 : 0;
      EXPECT_NEAR(is_float ? float_momentum : momentum, expected, is_float ? 1e-7 : 1e-15);
    }
  }
  for (const double kept : {0.3, -1.0}) {
    int64_t cur_iter = 4;
    double momentum = kept;
    ASSERT_EQ(advance_schedule(&cur_iter, &momentum, false, 10, kept < 0, nullptr), 0);
    EXPECT_EQ(cur_iter, 5);
    EXPECT_EQ(momentum, kept);
  }
}

}  // namespace
}  // namespace momentum_bn::kernels::cuda::test
