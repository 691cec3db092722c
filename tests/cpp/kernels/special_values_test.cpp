// Zeros, infinities, NaN, subnormal and huge numbers.

#include "calls.h"
#include "compare.h"
#include "inputs.h"
#include "instruction_sets.h"

#include <cmath>
#include <limits>

namespace momentum_bn::kernels::test {
namespace {

class SpecialValuesTest : public EveryKernel {
 protected:
  double largest() const {
    switch (type()) {
      case Type::kDouble:
        return std::numeric_limits<double>::max();
      case Type::kHalf:
        return 65504;
      default:
        return 3.3e38;
    }
  }

  double smallest() const { return spacing(type(), 0); }

  ForwardCall call_of(const Shape& shape, std::vector<double> x) const {
    ForwardCall call;
    call.type = type();
    call.shape = shape;
    call.x = rounded(type(), x);
    return call;
  }

  /// `values` over and over.
  static std::vector<double> repeated(const std::vector<double>& values, const Shape& shape) {
    std::vector<double> all(static_cast<size_t>(shape.values()));
    for (size_t i = 0; i < all.size(); ++i) {
      all[i] = values[i % values.size()];
    }
    return all;
  }

  static Coefficients same_for_all(const Shape& shape, double center, double scale, double shift) {
    const auto n = static_cast<size_t>(shape.channels);
    return {std::vector<double>(n, center), std::vector<double>(n, scale), std::vector<double>(n, shift)};
  }
};

TEST_P(SpecialValuesTest, ReluOfNaNAndInfinityIsThatOfTorch) {
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, repeated({kNaN, kInfinity, -kInfinity, -0.0, 0.0, -1, 1}, shape));
    for (const bool relu : {false, true}) {
      SCOPED_TRACE(name_of(shape) + (relu ? " relu" : ""));
      call.relu = relu;
      auto expected = relu ? repeated({kNaN, kInfinity, 0, 0, 0, 0, 1}, shape) : call.x;
      EXPECT_TRUE(near(type(), run_normalize(table(), call, same_for_all(shape, 0, 1, 0)).y, expected, 0));
    }
  }
}

TEST_P(SpecialValuesTest, ReluOfNaNInTheResidual) {
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, repeated({1, 1, 1, kInfinity}, shape));
    call.residual = repeated({kNaN, kInfinity, -kInfinity, -kInfinity}, shape);
    call.relu = true;
    SCOPED_TRACE(name_of(shape));
    const auto expected = repeated({kNaN, kInfinity, 0, kNaN}, shape);
    EXPECT_TRUE(near(type(), run_normalize(table(), call, same_for_all(shape, 0, 1, 0)).y, expected, 0));
  }
}

/// One NaN or infinity makes its channel's statistics NaN or infinite, and no other's.
TEST_P(SpecialValuesTest, StatisticsOfOtherChannelsAreSpared) {
  for (const Shape& shape : layouts()) {
    const auto clean_call = call_of(shape, unit_noise(shape.values(), 1));
    const auto clean = run_forward(table(), clean_call, layer_rule(type(), shape));
    for (const double bad : {kNaN, kInfinity, -kInfinity}) {
      for (const int64_t where : {int64_t{0}, shape.values() / 2, shape.values() - 1}) {
        auto call = clean_call;
        call.x[static_cast<size_t>(where)] = bad;
        const auto result = run_forward(table(), call, layer_rule(type(), shape));
        SCOPED_TRACE(name_of(shape) + " at " + std::to_string(where) + " " + std::to_string(bad));
        for (size_t c = 0; c < result.mean.size(); ++c) {
          if (static_cast<int64_t>(c) == where / shape.inner % shape.channels) {
            EXPECT_FALSE(std::isfinite(result.mean[c])) << c;
            EXPECT_FALSE(std::isfinite(result.m2[c])) << c;
          } else {
            // By another way perhaps, where its sums are taken again.
            EXPECT_NEAR(result.mean[c], clean.mean[c], 1e-6) << c;
            EXPECT_NEAR(result.m2[c], clean.m2[c], 2e-6 * clean.m2[c]) << c;
          }
        }
      }
    }
  }
}

/// Whatever x is, as long as it and its distance from the center are finite.
TEST_P(SpecialValuesTest, ScaleOfZeroLeavesTheShift) {
  for (const Shape& shape : layouts()) {
    for (const double center : {0.0, largest(), -largest()}) {
      const auto call = call_of(shape, repeated({center, center / 2, 1, center == 0 ? -largest() : 0}, shape));
      SCOPED_TRACE(name_of(shape) + " around " + std::to_string(center));
      const auto result = run_normalize(table(), call, same_for_all(shape, center, 0, 1.25));
      EXPECT_TRUE(result.y == std::vector<double>(call.x.size(), 1.25));
    }
  }
}

/// As large as the type holds: nothing overflows where the result itself does not.
TEST_P(SpecialValuesTest, StatisticsOfHugeValues) {
  if (type() == Type::kDouble) {
    GTEST_SKIP() << "there is no wider type to square the largest double in";
  }
  for (const Shape& shape : layouts()) {
    auto x = unit_noise(shape.values(), 1);
    for (double& value : x) {
      value *= largest() / 3.5;  // the noise's largest
    }
    const auto call = call_of(shape, x);
    SCOPED_TRACE(name_of(shape));
    const auto exact = statistics(shape, call.x);
    const auto result = run_forward(table(), call, layer_rule(type(), shape));
    const double n = static_cast<double>(shape.values_per_channel());
    for (size_t c = 0; c < exact.mean.size(); ++c) {
      EXPECT_NEAR(result.mean[c], exact.mean[c], 1e-6 * std::sqrt(exact.m2[c] / n)) << c;
      EXPECT_NEAR(result.m2[c], exact.m2[c], 2e-6 * exact.m2[c]) << c;
    }
  }
}

TEST_P(SpecialValuesTest, SubnormalNumbersAreKept) {
  for (const Shape& shape : layouts()) {
    const double tiny = smallest();
    const auto call = call_of(shape, repeated({tiny, -tiny, 3 * tiny, -0.0, 100 * tiny, 0}, shape));
    SCOPED_TRACE(name_of(shape));
    EXPECT_TRUE(near(Type::kFloat, run_normalize(table(), call, same_for_all(shape, 0, 1, 0)).y, call.x, 0));
    const auto result = run_forward(table(), call, layer_rule(type(), shape));
    for (const double mean : result.mean) {
      EXPECT_NEAR(mean, 0, 100 * tiny);
    }
    for (const double m2 : result.m2) {
      EXPECT_GE(m2, 0);
    }
  }
}

/// All 65536 values of a 16-bit type survive the way to float and back.
TEST_P(SpecialValuesTest, EveryValueOfSixteenBits) {
  if (size_of(type()) != 2) {
    GTEST_SKIP() << "not a 16-bit type";
  }
  for (const Shape& shape : {Shape{1, 1, 65'536}, Shape{1, 65'536, 1}, Shape{1024, 64, 1}, Shape{1, 4096, 16}}) {
    Buffer every(type(), shape.values());
    auto* bits = static_cast<uint16_t*>(every.data());
    for (int value = 0; value < 65'536; ++value) {
      bits[value] = static_cast<uint16_t>(value);
    }
    const auto call = call_of(shape, every.values());
    SCOPED_TRACE(name_of(shape));
    EXPECT_TRUE(near(Type::kFloat, run_normalize(table(), call, same_for_all(shape, 0, 1, 0)).y, call.x, 0));
    // Halfway to the next value and beyond: rounded to the nearest, ties to even.
    for (const double factor : {1 + 0x1p-9, 1 + 0x1p-12, 1 + 0x1p-8 + 0x1p-16, 1 - 0x1p-9}) {
      const auto coefficients = same_for_all(shape, 0, factor, 0);
      std::vector<double> exact;
      for (const double value : call.x) {
        exact.push_back(static_cast<float>(value * static_cast<float>(factor)));
      }
      EXPECT_TRUE(near(Type::kFloat, run_normalize(table(), call, coefficients).y, rounded(type(), exact), 0));
    }
  }
}

MOMENTUM_BN_FOR_EVERY_KERNEL(SpecialValuesTest);

}  // namespace
}  // namespace momentum_bn::kernels::test
