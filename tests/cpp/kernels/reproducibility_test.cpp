// The same bits for any number of threads, and for any instruction set where nothing is rounded.

#include "calls.h"
#include "inputs.h"
#include "instruction_sets.h"

#include <cmath>

namespace momentum_bn::kernels::test {
namespace {

constexpr int kFlags = 8;

/// relu, residual and in place in one of kFlags combinations.
ForwardCall with_flags(ForwardCall call, int flags) {
  call.relu = flags & 1;
  if (flags & 2) {
    call.residual = whole_numbers(call.shape.values(), -3, 3, 2);
  }
  call.in_place = flags & 4;
  return call;
}

BackwardCall with_flags(BackwardCall call, int flags) {
  if (flags & 1) {
    call.y = whole_numbers(call.shape.values(), -2, 2, 5);
  }
  call.with_dresidual = flags & 2;
  call.in_place = flags & 4;
  return call;
}

class ReproducibilityTest : public EveryKernel {};

TEST_P(ReproducibilityTest, ForwardOnAnyNumberOfThreads) {
  int flags = 0;
  for (const Shape& shape : shapes_for_threads()) {
    ForwardCall call;
    call.type = type();
    call.shape = shape;
    call.x = unit_noise(shape.values(), 1);
    call = with_flags(call, ++flags % kFlags);
    const auto rule = layer_rule(type(), shape);
    const auto first = run_forward(table(), call, rule);
    for (const auto& schedule : schedules()) {
      SCOPED_TRACE(name_of(shape) + ", " + schedule.name);
      call.parallel_for = schedule.parallel_for;
      const auto result = run_forward(table(), call, rule);
      EXPECT_TRUE(result.y == first.y);
      EXPECT_EQ(result.mean, first.mean);
      EXPECT_EQ(result.m2, first.m2);
    }
    EXPECT_TRUE(run_normalize(table(), call, first.coefficients).y == first.y) << "normalize";
  }
}

TEST_P(ReproducibilityTest, BackwardOnAnyNumberOfThreads) {
  int flags = 0;
  for (const Shape& shape : shapes_for_threads()) {
    BackwardCall call;
    call.type = type();
    call.shape = shape;
    call.x = unit_noise(shape.values(), 1);
    call.dy = unit_noise(shape.values(), 2);
    call = with_flags(call, ++flags % kFlags);
    const Coefficients coefficients = {uniform(shape.channels, -1, 1, 3), uniform(shape.channels, -1, 1, 4), {}};
    const auto first = run_backward(table(), call, coefficients).gradients;
    for (const auto& schedule : schedules()) {
      SCOPED_TRACE(name_of(shape) + ", " + schedule.name);
      call.parallel_for = schedule.parallel_for;
      const auto result = run_backward(table(), call, coefficients).gradients;
      EXPECT_EQ(result.sum_g, first.sum_g);
      EXPECT_EQ(result.sum_gx, first.sum_gx);
      EXPECT_TRUE(result.dx == first.dx);
      EXPECT_TRUE(result.dresidual == first.dresidual);
    }
  }
}

/// Each shape with another set of flags and another way to spread its tasks.
template <typename Run>
void for_exact_sums(const Run& run) {
  size_t turn = 0;
  for (const Shape& shape : shapes_for_exact_sums()) {
    for (int i = 0; i < 2; ++i) {
      const auto& schedule = schedules()[++turn % schedules().size()];
      SCOPED_TRACE(name_of(shape) + ", " + schedule.name);
      run(shape, static_cast<int>(turn % kFlags), schedule.parallel_for);
    }
  }
}

/// Scales that are powers of two: the variance is lost beside eps, which the weights make up for.
BlendRule exact_rule(const Shape& shape) {
  BlendRule rule = {0x1p100, static_cast<double>(shape.values_per_channel()), {}, {}};
  for (int64_t c = 0; c < shape.channels; ++c) {
    rule.weight.push_back(std::ldexp(c % 3 ? 1 : -1, static_cast<int>(50 - c % 2)));
    rule.bias.push_back(static_cast<double>(c % 5) - 2);
  }
  return rule;
}

/// Whole statistics, a scale that is a power of two: every rounding that there could be is of a number that needs none,
/// so the result is known to the bit.
TEST_P(ReproducibilityTest, ForwardOfExactStatistics) {
  for_exact_sums([&](const Shape& shape, int flags, ParallelFor parallel_for) {
    ForwardCall call;
    call.type = type();
    call.shape = shape;
    call.x = exact_statistics(shape, 1);
    call = with_flags(call, flags);
    const BlendRule rule = exact_rule(shape);
    const auto exact = statistics(shape, call.x);
    Coefficients coefficients = {exact.mean, {}, {}};
    for (int64_t c = 0; c < shape.channels; ++c) {
      ASSERT_EQ(exact.mean[static_cast<size_t>(c)], exact_mean(c));
      coefficients.scale.push_back(rule(c, 0).scale);
      coefficients.shift.push_back(rule(c, 0).shift);
    }
    const auto y = normalised(shape, call.x, coefficients, call.residual, call.relu);
    call.parallel_for = parallel_for;
    const auto result = run_forward(table(), call, rule);
    EXPECT_EQ(result.mean, exact.mean);
    EXPECT_EQ(result.m2, exact.m2);
    EXPECT_TRUE(result.y == y);
  });
}

TEST_P(ReproducibilityTest, BackwardOfExactSums) {
  for_exact_sums([&](const Shape& shape, int flags, ParallelFor parallel_for) {
    BackwardCall call;
    call.type = type();
    call.shape = shape;
    call.x = exact_statistics(shape, 1);
    call.dy = whole_numbers(shape.values(), -3, 3, 2);
    call = with_flags(call, flags);
    Coefficients coefficients;
    for (int64_t c = 0; c < shape.channels; ++c) {
      coefficients.center.push_back(exact_mean(c));
      coefficients.scale.push_back(std::ldexp(1, static_cast<int>(c % 4) - 2));
    }
    const auto expected = gradients(shape, call.dy, call.x, call.y, coefficients);
    call.parallel_for = parallel_for;
    const auto result = run_backward(table(), call, coefficients).gradients;
    EXPECT_EQ(result.sum_g, expected.sum_g);
    EXPECT_EQ(result.sum_gx, expected.sum_gx);
    EXPECT_TRUE(result.dx == expected.dx);
    if (call.with_dresidual) {
      EXPECT_TRUE(result.dresidual == expected.dresidual);
    }
  });
}

MOMENTUM_BN_FOR_EVERY_KERNEL(ReproducibilityTest);

}  // namespace
}  // namespace momentum_bn::kernels::test
