// Gradients through the statistics, and the ReLU's mask that is made from x, against float64.

#include "buffer.h"
#include "compare.h"
#include "inputs.h"
#include "kernels/cuda/launch.h"
#include "layer.h"
#include "ways.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <utility>

namespace momentum_bn::kernels::cuda::test {
namespace {

using kernels::test::accumulate_type;
using kernels::test::backward_inputs;
using kernels::test::Buffer;
using kernels::test::each_near;
using kernels::test::exact_mean;
using kernels::test::exact_statistics;
using kernels::test::layouts;
using kernels::test::near;
using kernels::test::rounded;
using kernels::test::shapes_for_exact_sums;
using kernels::test::size_of;
using kernels::test::sizes;
using kernels::test::spacing;
using kernels::test::uniform;
using kernels::test::unit_tolerance;
using kernels::test::whole_numbers;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

constexpr Gradient kWays[] = {Gradient::kThroughStatistics, Gradient::kThroughStatisticsInHalves};

class CudaThroughStatisticsTest : public EveryWay {
 protected:
  Type kept() const { return accumulate_type(type()); }

  /// Of a blend of weight 0.7, with a ReLU whose mask is in y.
  BackwardCall call_of(const Shape& shape, double mean) const {
    BackwardCall call{backward_inputs(type(), shape, mean)};
    const double n = static_cast<double>(shape.values_per_channel());
    call.gradient = Gradient::kThroughStatistics;
    const auto add_row = [&](double low, double high, uint64_t seed) {
      const auto row = rounded(kept(), uniform(shape.channels, low, high, seed));
      call.saved.insert(call.saved.end(), row.begin(), row.end());
    };
    add_row(mean - 0.1, mean + 0.1, 31);
    add_row(-1e-4, 1e-4, 33);
    add_row(0.5, 1.5, 34);
    add_row(-0.3, 0.3, 35);
    add_row(0.7 / n, 0.7 / n, 36);
    add_row(0.9 / n, 0.9 / n, 37);
    call.weight = rounded(kept(), uniform(shape.channels, -1, 1, 32));
    call.bias = rounded(kept(), uniform(shape.channels, -0.5, 0.5, 38));
    return call;
  }

  /// Sets y to what the forward pass writes without a residual where these are the statistics of the batch, and the
  /// first three rows of `saved` to what it saves.
  void take_forward(BackwardCall& call, const std::vector<double>& mean, const std::vector<double>& variance) const {
    ForwardCall forward;
    forward.type = call.type;
    forward.shape = call.shape;
    forward.x = call.x;
    forward.relu = true;
    forward.weight = call.weight;
    forward.bias = call.bias;
    forward.options.eps = 0;
    forward.options.variance = Variance::Biased;
    forward.ranks = 1;
    forward.gathered = mean;
    for (const double value : variance) {
      forward.gathered.push_back(2 * value);
    }
    forward.gathered.push_back(2);
    LayerState none;
    const auto result = run_forward(forward, none, device());
    call.y = result.y;
    std::copy(result.saved.begin(), result.saved.end(), call.saved.begin());
  }

  /// The same with those that `saved` has.
  void take_forward(BackwardCall& call) const {
    const auto channels = static_cast<size_t>(call.shape.channels);
    std::vector<double> mean;
    std::vector<double> variance;
    for (size_t c = 0; c < channels; ++c) {
      mean.push_back(call.saved[c] + call.saved[channels + c]);
      variance.push_back(1 / std::pow(call.saved[2 * channels + c], 2));
    }
    take_forward(call, mean, variance);
  }

  /// Sums of n numbers near 1, each rounded.
  void check_sums(const BackwardCall& call, const std::vector<double>& sums, const std::vector<double>& expected,
                  const char* name) const {
    const auto n = static_cast<double>(call.shape.values_per_channel());
    EXPECT_TRUE(each_near(sums, expected, std::vector<double>(expected.size(), unit_tolerance(type()) * n))) << name;
  }

  void check(const BackwardCall& call) const {
    SCOPED_TRACE(describe(call));
    const auto result = run_backward(call, device());
    const auto expected = expected_backward(call);
    // The sum of three terms, each in magnitude up to about 5.
    EXPECT_TRUE(near(type(), result.dx, expected.dx, 4 * unit_tolerance(type()))) << "dx";
    EXPECT_TRUE(result.dresidual == expected.dresidual) << "dresidual";
    check_sums(call, result.dbias, expected.dbias, "dbias");
    check_sums(call, result.dweight, expected.dweight, "dweight");
    check_sums(call, result.sums, expected.sums, "sums");
  }
};

TEST_P(CudaThroughStatisticsTest, EveryCombinationInEveryLayout) {
  for (const Shape& shape : layouts()) {
    const auto from_y = call_of(shape, 0.3);
    auto unmasked = from_y;
    unmasked.y.clear();
    auto from_x = from_y;
    take_forward(from_x);
    from_x.mask_from_x = true;
    unsigned flags = 0;
    for (const auto& all : {unmasked, from_y, from_x}) {
      for (const Gradient gradient : kWays) {
        for (const bool in_place : {false, true}) {
          auto call = all;
          call.gradient = gradient;
          call.in_place = in_place;
          call.with_dresidual = flags % 3 != 0;
          call.with_dbias = flags % 4 != 1;
          call.offset = flags % 5 == 3 ? 1 : flags % 5 == 4 ? 4 : 0;
          emulator::set_order(++flags);
          check(call);
        }
      }
    }
  }
}

TEST_P(CudaThroughStatisticsTest, EverySize) {
  unsigned flags = 0;
  for (const Shape& shape : sizes()) {
    if (shape.values() > 20'000) {
      continue;
    }
    auto call = call_of(shape, -0.2);
    ++flags;
    if (flags % 3 == 0) {
      call.y.clear();
    }
    if (flags % 3 == 1) {
      take_forward(call);
    }
    call.mask_from_x = flags % 3 == 1;
    call.gradient = kWays[flags % 2];
    call.with_dresidual = flags % 4 == 0;
    call.in_place = flags % 5 < 2;
    call.offset = flags % 7 == 6 ? 1 : 0;
    if (flags % 8 == 5) {
      call.weight.clear();
    }
    if (flags % 8 == 5 && call.mask_from_x) {
      take_forward(call);
    }
    check(call);
  }
}

/// What a batch normalised by itself gives, x far from zero: from the derivative itself, not from what is saved.
TEST_P(CudaThroughStatisticsTest, BatchFarFromZero) {
  if (size_of(type()) == 2) {
    GTEST_SKIP() << "a 16-bit type has no unit scale around 1e4";
  }
  for (const Shape& shape : layouts()) {
    if (shape.values_per_channel() < 64) {
      continue;
    }
    const auto n = static_cast<double>(shape.values_per_channel());
    const auto channels = static_cast<size_t>(shape.channels);
    auto call = call_of(shape, 1e4);
    call.y.clear();
    call.weight.clear();
    ForwardCall forward;
    forward.type = type();
    forward.shape = shape;
    forward.x = call.x;
    forward.options.variance = Variance::Biased;
    forward.through_statistics = true;
    LayerState none;
    call.saved = run_forward(forward, none, device()).saved;
    const auto result = run_backward(call, device());
    // Around the exact mean with the exact deviation.
    const auto exact = expected_statistics(shape, call.x);
    call.saved.assign(6 * channels, 0);
    for (size_t c = 0; c < channels; ++c) {
      call.saved[c] = exact[c];
      call.saved[2 * channels + c] = 1 / std::sqrt(exact[channels + c] / n + 1e-5);
      call.saved[4 * channels + c] = call.saved[5 * channels + c] = 1 / n;
    }
    SCOPED_TRACE(describe(call));
    EXPECT_TRUE(near(type(), result.dx, expected_backward(call).dx, type() == Type::kDouble ? 1e-11 : 2e-6));
  }
}

/// Every sum and every product is exact: known to the bit.
TEST_P(CudaThroughStatisticsTest, ExactSums) {
  unsigned turn = 0;
  for (const Shape& shape : shapes_for_exact_sums()) {
    if (shape.values() > 100'000) {
      continue;
    }
    auto call = call_of(shape, 0);
    const auto channels = static_cast<size_t>(shape.channels);
    for (size_t row = 0; row < 6; ++row) {
      for (size_t c = 0; c < channels; ++c) {
        const double values[] = {
            exact_mean(static_cast<int64_t>(c)), 0,       std::ldexp(1, static_cast<int>(c % 3) - 1),
            static_cast<double>(c % 2),          0x1p-10, 0x1p-12};
        call.saved[row * channels + c] = values[row];
      }
    }
    call.weight.clear();
    call.x = exact_statistics(shape, 1);
    call.dy = whole_numbers(shape.values(), -3, 3, 2);
    for (const Gradient gradient : kWays) {
      emulator::set_order(++turn);
      call.gradient = gradient;
      call.y = turn % 3 ? whole_numbers(shape.values(), -2, 2, 5) : std::vector<double>();
      call.with_dresidual = turn % 4 > 1;
      call.in_place = turn % 5 == 0;
      SCOPED_TRACE(describe(call));
      const auto result = run_backward(call, device());
      const auto expected = expected_backward(call);
      EXPECT_EQ(result.dbias, rounded(kept(), expected.dbias));
      EXPECT_EQ(result.dweight, rounded(kept(), expected.dweight));
      EXPECT_EQ(result.sums, expected.sums);
      EXPECT_TRUE(result.dx == rounded(type(), rounded(kept(), expected.dx)));
    }
  }
}

TEST_P(CudaThroughStatisticsTest, SameBitsInEveryOrder) {
  unsigned turn = 0;
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, 0.3);
    call.gradient = kWays[++turn % 2];
    emulator::set_order(0);
    const auto first = run_backward(call, device());
    SCOPED_TRACE(describe(call));
    for (const uint64_t seed : {1, 2}) {
      emulator::set_order(seed);
      const auto again = run_backward(call, device());
      EXPECT_EQ(again.dweight, first.dweight);
      EXPECT_EQ(again.dbias, first.dbias);
      EXPECT_EQ(again.sums, first.sums);
      EXPECT_TRUE(again.dx == first.dx);
    }
  }
}

TEST_P(CudaThroughStatisticsTest, NaNStaysInItsChannel) {
  for (const Shape& shape : layouts()) {
    if (shape.channels == 1) {
      continue;
    }
    for (const double bad : {kNaN, kInfinity}) {
      auto call = call_of(shape, 0);
      call.y.clear();
      call.dy.back() = bad;
      const auto result = run_backward(call, device());
      SCOPED_TRACE(describe(call));
      for (size_t i = 0; i < result.dx.size(); ++i) {
        const auto channel = static_cast<int64_t>(i) / shape.inner % shape.channels;
        ASSERT_EQ(std::isfinite(result.dx[i]), channel != shape.channels - 1) << i;
      }
    }
  }
}

/// Where the mask stops a gradient it is gone, whatever it was.
TEST_P(CudaThroughStatisticsTest, MaskStopsInfinityAndNaN) {
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, 0);
    for (size_t i = 0; i < call.dy.size(); ++i) {
      if (!(call.y[i] > 0)) {
        call.dy[i] = i % 2 ? kInfinity : kNaN;
      }
    }
    check(call);
  }
}

/// Gradients of 1e30 overflow nowhere on the way.
TEST_P(CudaThroughStatisticsTest, HugeGradients) {
  if (type() == Type::kHalf) {
    GTEST_SKIP() << "holds no such values";
  }
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, 0);
    for (double& dy : call.dy) {
      dy *= 1e30;
    }
    call.dy = rounded(type(), call.dy);
    SCOPED_TRACE(describe(call));
    const auto expected = expected_backward(call);
    std::vector<double> tolerances;
    for (const double dx : expected.dx) {
      tolerances.push_back(4e30 * unit_tolerance(type()) + (size_of(type()) == 2 ? spacing(type(), dx) : 0));
    }
    EXPECT_TRUE(each_near(run_backward(call, device()).dx, expected.dx, tolerances));
  }
}

/// A weight of 0 stops the gradient of x, and no other.
TEST_P(CudaThroughStatisticsTest, WeightOfZero) {
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, 0);
    call.weight.assign(call.weight.size(), 0);
    check(call);
    // y is its bias.
    take_forward(call);
    call.mask_from_x = true;
    check(call);
  }
}

/// One launch where the values stay on chip, two where they do not or where clusters cannot be had; in halves three.
TEST_P(CudaThroughStatisticsTest, Launches) {
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, 0.3);
    const auto tiling =
        on_chip_tiling_of(type(), shape, backward_vector_of(type(), shape, {}), device(), kKeptBackward);
    SCOPED_TRACE(describe(call));
    auto before = emulator::launches();
    const auto launches = [&] { return emulator::launches() - std::exchange(before, emulator::launches()); };
    const auto usual = run_backward(call, device());
    EXPECT_EQ(launches(), tiling ? 1 : 2);
    call.gradient = Gradient::kThroughStatisticsInHalves;
    run_backward(call, device());
    EXPECT_EQ(launches(), 3);
    if (!tiling || tiling->slices == 1) {
      continue;
    }
    call.gradient = Gradient::kThroughStatistics;
    emulator::refuse_clusters(true);
    EXPECT_TRUE(near(type(), run_backward(call, device()).dx, usual.dx, unit_tolerance(type())));
    emulator::refuse_clusters(false);
    EXPECT_EQ(launches(), 2);
  }
}

/// With every kind of gradient: the same bits where the mask comes from x as where it comes from y.
class CudaMaskFromXTest : public CudaThroughStatisticsTest {
 protected:
  /// NaN is the same as NaN.
  static void expect_same(const std::vector<double>& values, const std::vector<double>& expected, const char* name) {
    EXPECT_TRUE(near(Type::kDouble, values, expected, 0)) << name;
  }

  /// Of a call with the forward pass's y.
  void check_masks(BackwardCall call) const {
    call.with_dresidual = true;  // g itself
    for (const Gradient gradient : {Gradient::kConstantStatistics, kWays[0], kWays[1]}) {
      call.gradient = gradient;
      call.mask_from_x = false;
      const auto expected = run_backward(call, device());
      call.mask_from_x = true;
      const auto result = run_backward(call, device());
      SCOPED_TRACE(describe(call));
      expect_same(result.dresidual, expected.dresidual, "g");
      expect_same(result.dx, expected.dx, "dx");
      expect_same(result.dweight, expected.dweight, "dweight");
      expect_same(result.dbias, expected.dbias, "dbias");
      expect_same(result.sums, expected.sums, "sums");
      // Without dresidual the second launch makes the mask itself.
      auto alone = call;
      alone.with_dresidual = false;
      expect_same(run_backward(alone, device()).dx, expected.dx, "dx alone");
    }
  }
};

TEST_P(CudaMaskFromXTest, EveryLayout) {
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, 0.3);
    take_forward(call);
    check_masks(call);
  }
}

/// Outputs so near 0 that their sign hangs on the last bit: y is 0 but for rounding.
TEST_P(CudaMaskFromXTest, OutputsNearZero) {
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, 0);
    const auto channels = static_cast<size_t>(shape.channels);
    for (size_t i = 0; i < call.x.size(); ++i) {
      const size_t c = i / static_cast<size_t>(shape.inner) % channels;
      call.x[i] = call.saved[c] + 1 + 1e-7 * call.x[i];
    }
    // x = center + 1 leads to about 0.
    for (size_t c = 0; c < channels; ++c) {
      call.bias[c] = -call.weight[c] * call.saved[2 * channels + c];
    }
    call.bias = rounded(kept(), call.bias);
    call.x = rounded(type(), call.x);
    take_forward(call);
    check_masks(call);
  }
}

TEST_P(CudaMaskFromXTest, SpecialValues) {
  const double largest = type() == Type::kHalf ? 65504 : type() == Type::kDouble ? 1e308 : 3.3e38;
  const double tiny = spacing(type(), 0);
  const double values[] = {kNaN, kInfinity, -kInfinity, 0.0, -0.0, largest, -largest, tiny, -tiny, 1, -1, 1e30, -1e30};
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, 0);
    const auto channels = static_cast<size_t>(shape.channels);
    for (size_t i = 0; i < call.x.size(); ++i) {
      call.x[i] = values[i % std::size(values)];
    }
    call.x = rounded(type(), call.x);
    std::vector<double> mean;
    for (size_t c = 0; c < channels; ++c) {
      if (c % 3 == 0) {
        call.weight[c] = 0;
      }
      if (c % 4 == 0) {
        call.bias[c] = 0;
      }
      mean.push_back(c % 7 == 6 ? kNaN : c % 5 != 0 ? 0.25 : c % 2 ? largest : -largest);
    }
    take_forward(call, mean, std::vector<double>(channels, 1.5));
    check_masks(call);
  }
}

/// Every value that y can have in a 16-bit type, and those halfway to 0.
TEST_P(CudaMaskFromXTest, EveryValueOfSixteenBits) {
  if (size_of(type()) != 2) {
    GTEST_SKIP() << "not a 16-bit type";
  }
  const Shape shape = {1024, 64, 1};
  Buffer every(type(), shape.values());
  auto* bits = static_cast<uint16_t*>(every.data());
  for (int value = 0; value < 65'536; ++value) {
    bits[value] = static_cast<uint16_t>(value);
  }
  for (const double scale : {1.0, 0.5, 0.25, 0.75}) {
    for (const double sign : {1, -1}) {
      auto call = call_of(shape, 0);
      const auto channels = static_cast<size_t>(shape.channels);
      call.x = every.values();
      call.weight.assign(channels, sign);
      call.bias.clear();
      take_forward(call, std::vector<double>(channels, 0), std::vector<double>(channels, 1 / (scale * scale)));
      check_masks(call);
    }
  }
}

MOMENTUM_BN_FOR_WAYS(CudaThroughStatisticsTest, forward_ways());
MOMENTUM_BN_FOR_WAYS(CudaMaskFromXTest, forward_ways());

}  // namespace
}  // namespace momentum_bn::kernels::cuda::test
