// Statistics, blend and normalisation against float64.

#include "calls.h"
#include "compare.h"
#include "inputs.h"
#include "instruction_sets.h"

#include <algorithm>
#include <cmath>

namespace momentum_bn::kernels::test {
namespace {

/// Eight calls with each combination of relu, residual and in place.
template <typename Run>
void for_flags(ForwardCall call, const Run& run) {
  const auto residual = rounded(call.type, uniform(call.shape.values(), -1, 1, 2));
  for (int flags = 0; flags < 8; ++flags) {
    call.relu = flags & 1;
    call.residual = flags & 2 ? residual : std::vector<double>();
    call.in_place = flags & 4;
    call.offset = flags % 3;
    SCOPED_TRACE(describe(call));
    run(call);
  }
}

class ForwardTest : public EveryKernel {
 protected:
  void expect_right_statistics(const Shape& shape, const ForwardResult& result, const Statistics& exact,
                               double tolerance) const {
    const double n = static_cast<double>(shape.values_per_channel());
    std::vector<double> mean_tolerance;
    std::vector<double> m2_tolerance;
    for (const double m2 : exact.m2) {
      mean_tolerance.push_back(tolerance * std::sqrt(m2 / n));
      m2_tolerance.push_back(2 * tolerance * m2);  // y takes its square root
    }
    EXPECT_TRUE(each_near(result.mean, exact.mean, mean_tolerance)) << "mean";
    EXPECT_TRUE(each_near(result.m2, exact.m2, m2_tolerance)) << "m2";
  }

  void check_forward(const ForwardCall& call, const Statistics& exact, double tolerance) const {
    const auto rule = layer_rule(type(), call.shape);
    const auto result = run_forward(table(), call, rule);
    expect_right_statistics(call.shape, result, exact, tolerance);
    Coefficients coefficients = {exact.mean, {}, {}};
    for (int64_t c = 0; c < call.shape.channels; ++c) {
      const auto blended = rule(c, exact.m2[static_cast<size_t>(c)]);
      coefficients.scale.push_back(blended.scale);
      coefficients.shift.push_back(blended.shift);
    }
    const auto expected = normalised(call.shape, call.x, coefficients, call.residual, call.relu);
    EXPECT_TRUE(near(type(), result.y, expected, tolerance)) << "y";
  }

  void check_normalize(const ForwardCall& call, const Coefficients& coefficients) const {
    const auto result = run_normalize(table(), call, coefficients);
    const auto expected = normalised(call.shape, call.x, result.coefficients, call.residual, call.relu);
    EXPECT_TRUE(near(type(), result.y, expected, unit_tolerance(type()))) << "y of normalize";
  }

  ForwardCall call_of(const Shape& shape, double mean) const { return {forward_inputs(type(), shape, mean)}; }
};

TEST_P(ForwardTest, EveryCombinationInEveryLayout) {
  for (const Shape& shape : layouts()) {
    const auto plain = call_of(shape, 0.3);
    const auto exact = statistics(shape, plain.x);
    for_flags(plain, [&](const ForwardCall& call) { check_forward(call, exact, unit_tolerance(type())); });
  }
}

TEST_P(ForwardTest, NormalizeInEveryLayout) {
  for (const Shape& shape : layouts()) {
    const Coefficients coefficients = {uniform(shape.channels, -1, 1, 21), uniform(shape.channels, -1, 1, 22),
                                       uniform(shape.channels, -1, 1, 23)};
    for_flags(call_of(shape, 0), [&](const ForwardCall& call) { check_normalize(call, coefficients); });
  }
}

/// Of a group of processes: the statistics alone, the same bits.
TEST_P(ForwardTest, StatisticsAlone) {
  auto shapes = layouts();
  const auto more = sizes();
  shapes.insert(shapes.end(), more.begin(), more.end());
  for (const Shape& shape : shapes) {
    const auto call = call_of(shape, 0.3);
    SCOPED_TRACE(describe(call));
    const auto alone = run_statistics(table(), call);
    const auto with_the_rest = run_forward(table(), call, layer_rule(type(), shape));
    EXPECT_EQ(alone.mean, with_the_rest.mean);
    EXPECT_EQ(alone.m2, with_the_rest.m2);
  }
}

TEST_P(ForwardTest, EverySize) {
  int flags = 0;
  for (const Shape& shape : sizes()) {
    auto call = call_of(shape, -0.2);
    ++flags;
    call.relu = flags % 2 == 1;
    if (flags % 3 == 0) {
      call.residual = rounded(type(), uniform(shape.values(), -1, 1, 2));
    }
    call.in_place = flags % 5 < 3;
    call.offset = flags % 4;
    SCOPED_TRACE(describe(call));
    check_forward(call, statistics(shape, call.x), unit_tolerance(type()));
  }
}

/// Ten thousand standard deviations away, in the 16-bit types as far as their values go.
TEST_P(ForwardTest, FarFromZero) {
  const double offset = type() == Type::kBFloat16 ? 64 : type() == Type::kHalf ? 512 : 1e4;
  // The mean of doubles so far away is rounded by 1e-12 wherever parts are merged.
  const double tolerance = type() == Type::kDouble ? 4e-11 : 1e-6;
  for (const Shape& shape : layouts()) {
    for (const double mean : {offset, -offset}) {
      const auto call = call_of(shape, mean);
      SCOPED_TRACE(describe(call));
      check_forward(call, statistics(shape, call.x), tolerance);
    }
  }
}

/// Statistics of a constant are exact: the mean is it, the deviation 0.
TEST_P(ForwardTest, ConstantChannels) {
  for (const Shape& shape : layouts()) {
    for (const double value : {0.0, 1.0, -3.3, 3000.7, 1e-7, -1e15}) {
      ForwardCall call;
      call.type = type();
      call.shape = shape;
      call.x = rounded(type(), std::vector<double>(static_cast<size_t>(shape.values()), value));
      if (std::isinf(call.x[0])) {
        continue;
      }
      SCOPED_TRACE(describe(call) + " of " + std::to_string(call.x[0]));
      const auto result = run_forward(table(), call, layer_rule(type(), shape));
      const std::vector<double> mean(static_cast<size_t>(shape.channels), call.x[0]);
      EXPECT_EQ(result.mean, mean);
      EXPECT_EQ(result.m2, std::vector<double>(static_cast<size_t>(shape.channels), 0));
    }
  }
}

/// Outputs far beyond any cache, where a kernel may store past it.
TEST_P(ForwardTest, LargeOutputs) {
  if (type() != Type::kFloat) {
    GTEST_SKIP() << "enough with float";
  }
  for (const Shape& shape : {Shape{13, 64, 12'545}, Shape{163'841, 64, 1}}) {  // 42 MB
    auto call = call_of(shape, 0.3);
    call.offset = 1;
    call.relu = true;
    SCOPED_TRACE(describe(call));
    check_forward(call, statistics(shape, call.x), unit_tolerance(type()));
  }
}

MOMENTUM_BN_FOR_EVERY_KERNEL(ForwardTest);

}  // namespace
}  // namespace momentum_bn::kernels::test
