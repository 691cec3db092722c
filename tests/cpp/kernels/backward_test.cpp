// Gradients and their sums against float64.

#include "calls.h"
#include "compare.h"
#include "inputs.h"
#include "instruction_sets.h"

#include <cmath>
#include <limits>

namespace momentum_bn::kernels::test {
namespace {

class BackwardTest : public EveryKernel {
 protected:
  BackwardCall call_of(const Shape& shape, double mean) const { return {backward_inputs(type(), shape, mean)}; }

  Coefficients coefficients_of(const Shape& shape, double mean) const {
    return {rounded(accumulate_type(type()), uniform(shape.channels, mean - 0.1, mean + 0.1, 31)),
            rounded(accumulate_type(type()), uniform(shape.channels, -1, 1, 32)),
            {}};
  }

  void check(const BackwardCall& call, const Coefficients& coefficients) const {
    check(call, coefficients, gradients(call.shape, call.dy, call.x, call.y, coefficients));
  }

  void check(const BackwardCall& call, const Coefficients& coefficients, const Gradients& expected) const {
    const auto result = run_backward(table(), call, coefficients).gradients;
    const double tolerance = unit_tolerance(type());
    if (call.with_dx) {
      EXPECT_TRUE(near(type(), result.dx, expected.dx, tolerance)) << "dx";
    }
    if (call.with_dresidual) {
      EXPECT_TRUE(result.dresidual == expected.dresidual) << "dresidual";
    }
    // Relative to the terms: in magnitude about 1.
    const double n = static_cast<double>(call.shape.values_per_channel());
    const std::vector<double> tolerances(static_cast<size_t>(call.shape.channels), tolerance * n);
    EXPECT_TRUE(each_near(result.sum_g, expected.sum_g, tolerances)) << "sum_g";
    if (!call.x.empty()) {
      EXPECT_TRUE(each_near(result.sum_gx, expected.sum_gx, tolerances)) << "sum_gx";
    }
  }
};

TEST_P(BackwardTest, EveryCombinationInEveryLayout) {
  for (const Shape& shape : layouts()) {
    const auto full = call_of(shape, 0.3);
    const auto coefficients = coefficients_of(shape, 0.3);
    const auto masked = gradients(shape, full.dy, full.x, full.y, coefficients);
    const auto unmasked = gradients(shape, full.dy, full.x, {}, coefficients);
    for (int flags = 0; flags < 32; ++flags) {
      auto call = full;
      if (flags & 1) {
        call.x.clear();
      }
      if (flags & 2) {
        call.y.clear();
      }
      call.with_dx = !(flags & 4);
      call.with_dresidual = flags & 8;
      call.in_place = flags & 16;
      if (call.in_place && !call.with_dx) {
        continue;
      }
      call.offset = flags % 3;
      SCOPED_TRACE(describe(call));
      check(call, coefficients, call.y.empty() ? unmasked : masked);
    }
  }
}

TEST_P(BackwardTest, EverySize) {
  int flags = 0;
  for (const Shape& shape : sizes()) {
    auto call = call_of(shape, 0);
    ++flags;
    if (flags % 2) {
      call.y.clear();
    }
    call.with_dresidual = flags % 3 == 0;
    call.in_place = flags % 5 < 3;
    call.offset = flags % 4;
    SCOPED_TRACE(describe(call));
    check(call, coefficients_of(shape, 0));
  }
}

/// dweight as the layer forms it: x around 1e4, its mean in two parts.
TEST_P(BackwardTest, GradientOfWeightFarFromZero) {
  if (size_of(type()) == 2) {
    GTEST_SKIP() << "a 16-bit type has no unit scale around 1e4";
  }
  for (const Shape& shape : layouts()) {
    if (shape.values_per_channel() < 64) {
      continue;
    }
    auto call = call_of(shape, 1e4);
    call.y.clear();
    const auto exact = statistics(shape, call.x);
    const auto coefficients = Coefficients{rounded(accumulate_type(type()), exact.mean), exact.mean, {}};
    SCOPED_TRACE(describe(call));
    const auto result = run_backward(table(), call, coefficients).gradients;
    const auto expected = gradients(shape, call.dy, call.x, {}, {exact.mean, exact.mean, {}});
    std::vector<double> dweight;
    std::vector<double> tolerances;
    for (size_t c = 0; c < exact.mean.size(); ++c) {
      dweight.push_back(result.sum_gx[c] - (exact.mean[c] - coefficients.center[c]) * result.sum_g[c]);
      tolerances.push_back((type() == Type::kDouble ? 1e-11 : 1e-6) * std::abs(expected.sum_gx[c]));
    }
    EXPECT_TRUE(each_near(dweight, expected.sum_gx, tolerances));
  }
}

/// Where the mask stops a gradient it is gone, whatever it was.
TEST_P(BackwardTest, MaskStopsInfinityAndNaN) {
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, 0);
    call.with_dresidual = true;
    for (size_t i = 0; i < call.dy.size(); ++i) {
      if (call.y[i] > 0) {
        continue;
      }
      call.dy[i] = i % 2 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
    }
    SCOPED_TRACE(describe(call));
    check(call, coefficients_of(shape, 0));
  }
}

/// A gradient that is not a number, or infinite, reaches its own channel and no other.
TEST_P(BackwardTest, NaNStaysInItsChannel) {
  for (const Shape& shape : layouts()) {
    if (shape.channels == 1) {
      continue;
    }
    auto call = call_of(shape, 0);
    call.y.clear();
    call.dy[call.dy.size() - 1] = std::numeric_limits<double>::quiet_NaN();
    SCOPED_TRACE(describe(call));
    check(call, coefficients_of(shape, 0));
  }
}

MOMENTUM_BN_FOR_EVERY_KERNEL(BackwardTest);

}  // namespace
}  // namespace momentum_bn::kernels::test
