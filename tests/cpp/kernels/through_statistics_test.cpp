// Gradients through the statistics, and the ReLU's mask that is made from x, against float64.

#include "calls.h"
#include "compare.h"
#include "inputs.h"
#include "instruction_sets.h"

#include <cmath>

namespace momentum_bn::kernels::test {
namespace {

constexpr Gradient kWays[] = {Gradient::kThroughStatistics, Gradient::kThroughStatisticsInHalves};

class ThroughStatisticsTest : public EveryKernel {
 protected:
  /// As a blend of weight 0.7 leaves it.
  LayerArrays layer_of(const Shape& shape, double mean) const {
    const Type kept = accumulate_type(type());
    const double n = static_cast<double>(shape.values_per_channel());
    LayerArrays layer;
    const auto add_row = [&](double low, double high, uint64_t seed) {
      const auto row = rounded(kept, uniform(shape.channels, low, high, seed));
      layer.saved.insert(layer.saved.end(), row.begin(), row.end());
    };
    add_row(mean - 0.1, mean + 0.1, 31);
    add_row(-1e-4, 1e-4, 33);
    add_row(0.5, 1.5, 34);
    add_row(-0.3, 0.3, 35);
    add_row(0.7 / n, 0.7 / n, 36);
    add_row(0.9 / n, 0.9 / n, 37);
    layer.weight = rounded(kept, uniform(shape.channels, -1, 1, 32));
    return layer;
  }

  BackwardCall call_of(const Shape& shape, double mean, const LayerArrays& layer) const {
    BackwardCall call = {backward_inputs(type(), shape, mean)};
    call.gradient = Gradient::kThroughStatistics;
    call.saved = layer.saved;
    call.weight = layer.weight;
    call.bias = rounded(accumulate_type(type()), uniform(shape.channels, -0.5, 0.5, 38));
    return call;
  }

  /// What the forward pass wrote without a residual.
  std::vector<double> y_of(const BackwardCall& call) const {
    ForwardCall forward;
    forward.type = call.type;
    forward.shape = call.shape;
    forward.x = call.x;
    forward.relu = true;
    return run_normalize(table(), forward, call.saved, call.weight, call.bias).y;
  }

  void check(const BackwardCall& call, const Gradients& expected) const {
    SCOPED_TRACE(describe(call));
    const auto result = run_backward(table(), call);
    const double tolerance = unit_tolerance(type());
    // The sum of three terms, each in magnitude up to about 5.
    EXPECT_TRUE(near(type(), result.gradients.dx, expected.dx, 4 * tolerance)) << "dx";
    if (call.with_dresidual) {
      EXPECT_TRUE(result.gradients.dresidual == expected.dresidual) << "dresidual";
    }
    const auto channels = static_cast<size_t>(call.shape.channels);
    const double n = static_cast<double>(call.shape.values_per_channel());
    const std::vector<double> tolerances(channels, tolerance * n);
    EXPECT_TRUE(each_near(result.gradients.sum_g, expected.sum_g, tolerances)) << "sum_g";
    EXPECT_TRUE(each_near(result.gradients.sum_gx, expected.sum_gx, tolerances)) << "sum_gx";
    std::vector<double> dweight;
    std::vector<double> dbias;
    for (size_t c = 0; c < channels; ++c) {
      dweight.push_back(result.gradients.sum_gx[c] * call.saved[2 * channels + c]);
      dbias.push_back(result.gradients.sum_g[c]);
    }
    EXPECT_TRUE(near(Type::kDouble, result.dweight, rounded(accumulate_type(type()), dweight), 0)) << "dweight";
    EXPECT_TRUE(near(Type::kDouble, result.dbias, rounded(accumulate_type(type()), dbias), 0)) << "dbias";
  }
};

TEST_P(ThroughStatisticsTest, EveryCombinationInEveryLayout) {
  for (const Shape& shape : layouts()) {
    const auto layer = layer_of(shape, 0.3);
    const auto full = call_of(shape, 0.3, layer);
    const auto y_again = y_of(full);
    const auto unmasked = gradients_through_statistics(shape, full.dy, full.x, {}, layer);
    const auto masked = gradients_through_statistics(shape, full.dy, full.x, full.y, layer);
    const auto masked_from_x = gradients_through_statistics(shape, full.dy, full.x, y_again, layer);
    for (int flags = 0; flags < 24; ++flags) {
      auto call = full;
      call.with_dresidual = flags & 1;
      call.in_place = flags & 2;
      call.gradient = kWays[flags / 4 % 2];
      call.offset = flags % 3;
      const int mask = flags / 8;
      if (mask == 0) {
        call.y.clear();
      }
      call.mask_from_x = mask == 2;
      check(call, mask == 0 ? unmasked : mask == 1 ? masked : masked_from_x);
    }
  }
}

TEST_P(ThroughStatisticsTest, EverySize) {
  int flags = 0;
  for (const Shape& shape : sizes()) {
    const auto layer = layer_of(shape, 0);
    auto call = call_of(shape, 0, layer);
    ++flags;
    call.mask_from_x = flags % 3 == 1;
    if (flags % 3 == 2) {
      call.y.clear();
    }
    if (call.mask_from_x) {
      call.y = y_of(call);
    }
    call.with_dresidual = flags % 4 == 0;
    call.in_place = flags % 5 < 3;
    call.gradient = kWays[flags % 2];
    call.offset = flags % 4;
    check(call, gradients_through_statistics(shape, call.dy, call.x, call.y, layer));
  }
}

/// Far beyond the caches, where rows are taken from several places at once.
TEST_P(ThroughStatisticsTest, LargeInputs) {
  if (type() != Type::kFloat) {
    GTEST_SKIP() << "enough with float";
  }
  for (const Shape& shape : {Shape{13, 64, 12'545}, Shape{70'001, 70, 1}}) {
    const auto layer = layer_of(shape, 0.3);
    auto call = call_of(shape, 0.3, layer);
    call.mask_from_x = true;
    call.in_place = true;
    call.y = y_of(call);
    check(call, gradients_through_statistics(shape, call.dy, call.x, call.y, layer));
  }
}

/// What a batch normalised by itself gives, x far from zero: from the derivative itself, not from what is saved.
TEST_P(ThroughStatisticsTest, BatchFarFromZero) {
  if (size_of(type()) == 2) {
    GTEST_SKIP() << "a 16-bit type has no unit scale around 1e4";
  }
  for (const Shape& shape : layouts()) {
    if (shape.values_per_channel() < 64) {
      continue;
    }
    const auto n = static_cast<double>(shape.values_per_channel());
    auto call = call_of(shape, 1e4, {});
    call.y.clear();
    const auto exact = statistics(shape, call.x);
    ForwardCall forward;
    forward.type = type();
    forward.shape = shape;
    forward.x = call.x;
    call.saved = saved_by_forward(table(), forward, {1e-5, n, {}, {}}, kSavedRowsThroughStatistics);
    const auto result = run_backward(table(), call);
    // Around the exact mean with the exact deviation.
    LayerArrays layer = {std::vector<double>(6 * exact.mean.size(), 0), {}};
    for (size_t c = 0; c < exact.mean.size(); ++c) {
      layer.saved[c] = exact.mean[c];
      layer.saved[2 * exact.mean.size() + c] = 1 / std::sqrt(exact.m2[c] / n + 1e-5);
      layer.saved[4 * exact.mean.size() + c] = layer.saved[5 * exact.mean.size() + c] = 1 / n;
    }
    SCOPED_TRACE(describe(call));
    const auto expected = gradients_through_statistics(shape, call.dy, call.x, {}, layer);
    EXPECT_TRUE(near(type(), result.gradients.dx, expected.dx, type() == Type::kDouble ? 1e-11 : 2e-6));
  }
}

/// Every sum and every product is exact: known to the bit.
TEST_P(ThroughStatisticsTest, ExactSums) {
  size_t turn = 0;
  for (const Shape& shape : shapes_for_exact_sums()) {
    const auto channels = static_cast<size_t>(shape.channels);
    LayerArrays layer;
    for (size_t row = 0; row < 6; ++row) {
      for (size_t c = 0; c < channels; ++c) {
        const double values[] = {
            exact_mean(static_cast<int64_t>(c)), 0,       std::ldexp(1, static_cast<int>(c % 3) - 1),
            static_cast<double>(c % 2),          0x1p-10, 0x1p-12};
        layer.saved.push_back(values[row]);
      }
    }
    BackwardCall call;
    call.type = type();
    call.shape = shape;
    call.x = exact_statistics(shape, 1);
    call.dy = whole_numbers(shape.values(), -3, 3, 2);
    call.saved = layer.saved;
    for (int flags = 0; flags < 4; ++flags) {
      const auto& schedule = schedules()[++turn % schedules().size()];
      SCOPED_TRACE(name_of(shape) + ", " + schedule.name);
      call.parallel_for = schedule.parallel_for;
      call.y = flags & 1 ? whole_numbers(shape.values(), -2, 2, 5) : std::vector<double>();
      call.with_dresidual = flags & 2;
      call.in_place = turn % 3 == 0;
      call.gradient = kWays[turn % 2];
      const auto result = run_backward(table(), call).gradients;
      const auto expected = gradients_through_statistics(shape, call.dy, call.x, call.y, layer);
      EXPECT_EQ(result.sum_g, expected.sum_g);
      EXPECT_EQ(result.sum_gx, expected.sum_gx);
      EXPECT_TRUE(result.dx == rounded(type(), rounded(accumulate_type(type()), expected.dx)));
      if (call.with_dresidual) {
        EXPECT_TRUE(result.dresidual == expected.dresidual);
      }
    }
  }
}

TEST_P(ThroughStatisticsTest, SameBitsOnAnyNumberOfThreads) {
  int flags = 0;
  for (const Shape& shape : shapes_for_threads()) {
    auto call = call_of(shape, 0, layer_of(shape, 0));
    ++flags;
    call.mask_from_x = flags % 3 == 1;
    if (flags % 3 == 2) {
      call.y.clear();
    }
    call.with_dresidual = flags % 2;
    call.in_place = flags % 4 < 2;
    for (const Gradient way : kWays) {
      call.gradient = way;
      call.parallel_for = serial;
      const auto first = run_backward(table(), call);
      for (const auto& schedule : schedules()) {
        SCOPED_TRACE(describe(call) + ", " + schedule.name);
        call.parallel_for = schedule.parallel_for;
        const auto result = run_backward(table(), call);
        EXPECT_TRUE(result.gradients.dx == first.gradients.dx);
        EXPECT_TRUE(result.gradients.dresidual == first.gradients.dresidual);
        EXPECT_EQ(result.gradients.sum_g, first.gradients.sum_g);
        EXPECT_EQ(result.gradients.sum_gx, first.gradients.sum_gx);
        EXPECT_EQ(result.dweight, first.dweight);
        EXPECT_EQ(result.dbias, first.dbias);
      }
    }
  }
}

/// With every kind of gradient: the same g where the mask comes from x as where it comes from y.
class MaskFromXTest : public ThroughStatisticsTest {
 protected:
  void check_masks(BackwardCall call) const {
    call.y = y_of(call);
    call.with_dresidual = true;  // g itself
    for (const Gradient gradient : {Gradient::kConstantStatistics, kWays[0], kWays[1]}) {
      call.gradient = gradient;
      call.mask_from_x = false;
      const auto expected = run_backward(table(), call);
      call.mask_from_x = true;
      const auto result = run_backward(table(), call);
      SCOPED_TRACE(describe(call));
      EXPECT_TRUE(near(Type::kDouble, result.gradients.dresidual, expected.gradients.dresidual, 0)) << "g";
      EXPECT_TRUE(near(Type::kDouble, result.gradients.dx, expected.gradients.dx, 0)) << "dx";
      EXPECT_TRUE(near(Type::kDouble, result.dweight, expected.dweight, 0)) << "dweight";
      EXPECT_TRUE(near(Type::kDouble, result.dbias, expected.dbias, 0)) << "dbias";
      // Without dresidual the second half makes the mask itself.
      auto alone = call;
      alone.with_dresidual = false;
      EXPECT_TRUE(near(Type::kDouble, run_backward(table(), alone).gradients.dx, expected.gradients.dx, 0)) << "alone";
    }
  }
};

TEST_P(MaskFromXTest, EveryLayout) {
  for (const Shape& shape : layouts()) {
    check_masks(call_of(shape, 0.3, layer_of(shape, 0.3)));
  }
}

/// Outputs so near 0 that their sign hangs on the last bit: y is 0 but for rounding.
TEST_P(MaskFromXTest, OutputsNearZero) {
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, 0, layer_of(shape, 0));
    const auto channels = static_cast<size_t>(shape.channels);
    for (size_t c = 0; c < channels; ++c) {
      // x = center + 1 leads to about 0.
      call.bias[c] = -call.weight[c] * call.saved[2 * channels + c];
      call.x[c * static_cast<size_t>(shape.inner)] = call.saved[c] + 1;
    }
    for (size_t i = 0; i < call.x.size(); ++i) {
      const size_t c = i / static_cast<size_t>(shape.inner) % channels;
      call.x[i] = call.saved[c] + 1 + 1e-7 * call.x[i];
    }
    call.bias = rounded(accumulate_type(type()), call.bias);
    call.x = rounded(type(), call.x);
    check_masks(call);
  }
}

TEST_P(MaskFromXTest, SpecialValues) {
  const double largest = type() == Type::kHalf ? 65504 : type() == Type::kDouble ? 1e308 : 3.3e38;
  const double tiny = spacing(type(), 0);
  const double values[] = {kNaN, kInfinity, -kInfinity, 0.0, -0.0, largest, -largest, tiny, -tiny, 1, -1, 1e30, -1e30};
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, 0, layer_of(shape, 0));
    const auto channels = static_cast<size_t>(shape.channels);
    for (size_t i = 0; i < call.x.size(); ++i) {
      call.x[i] = values[i % std::size(values)];
    }
    call.x = rounded(type(), call.x);
    for (size_t c = 0; c < channels; ++c) {
      if (c % 3 == 0) {
        call.weight[c] = 0;
      }
      if (c % 5 == 0) {
        call.saved[c] = c % 2 ? largest : -largest;
      }
      if (c % 4 == 0) {
        call.bias[c] = 0;
      }
      if (c % 7 == 6) {
        call.saved[c] = kNaN;
      }
    }
    call.saved = rounded(accumulate_type(type()), call.saved);
    check_masks(call);
  }
}

/// Every value that y can have in a 16-bit type, and those halfway to 0.
TEST_P(MaskFromXTest, EveryValueOfSixteenBits) {
  if (size_of(type()) != 2) {
    GTEST_SKIP() << "not a 16-bit type";
  }
  for (const Shape& shape : {Shape{1, 1, 65'536}, Shape{1, 65'536, 1}, Shape{1024, 64, 1}, Shape{1, 4096, 16}}) {
    Buffer every(type(), shape.values());
    auto* bits = static_cast<uint16_t*>(every.data());
    for (int value = 0; value < 65'536; ++value) {
      bits[value] = static_cast<uint16_t>(value);
    }
    const auto channels = static_cast<size_t>(shape.channels);
    for (const double scale : {1.0, 0.5, 0.5 + 0x1p-12, 0.25, -0.5, 0.75}) {
      auto call = call_of(shape, 0, layer_of(shape, 0));
      call.x = every.values();
      call.weight.clear();
      call.bias.clear();
      std::fill_n(call.saved.begin(), 2 * channels, 0.0);
      std::fill_n(call.saved.begin() + static_cast<std::ptrdiff_t>(2 * channels), channels, scale);
      check_masks(call);
    }
  }
}

/// A weight of 0 stops the gradient of x, and no other.
TEST_P(ThroughStatisticsTest, WeightOfZero) {
  for (const Shape& shape : layouts()) {
    auto layer = layer_of(shape, 0);
    for (double& weight : layer.weight) {
      weight = 0;
    }
    const auto call = call_of(shape, 0, layer);
    check(call, gradients_through_statistics(shape, call.dy, call.x, call.y, layer));
  }
}

TEST_P(ThroughStatisticsTest, NaNStaysInItsChannel) {
  for (const Shape& shape : layouts()) {
    if (shape.channels == 1) {
      continue;
    }
    const auto layer = layer_of(shape, 0);
    for (const double bad : {kNaN, kInfinity}) {
      auto call = call_of(shape, 0, layer);
      call.y.clear();
      call.dy[call.dy.size() - 1] = bad;
      const auto result = run_backward(table(), call);
      const auto expected = gradients_through_statistics(shape, call.dy, call.x, {}, layer);
      SCOPED_TRACE(describe(call));
      const auto channels = static_cast<size_t>(shape.channels);
      for (size_t i = 0; i < expected.dx.size(); ++i) {
        const size_t c = i / static_cast<size_t>(shape.inner) % channels;
        ASSERT_EQ(std::isfinite(result.gradients.dx[i]), c != channels - 1) << i;
      }
    }
  }
}

/// Where the mask stops a gradient it is gone, whatever it was.
TEST_P(ThroughStatisticsTest, MaskStopsInfinityAndNaN) {
  for (const Shape& shape : layouts()) {
    const auto layer = layer_of(shape, 0);
    auto call = call_of(shape, 0, layer);
    for (size_t i = 0; i < call.dy.size(); ++i) {
      if (!(call.y[i] > 0)) {
        call.dy[i] = i % 2 ? kInfinity : kNaN;
      }
    }
    check(call, gradients_through_statistics(shape, call.dy, call.x, call.y, layer));
  }
}

/// Gradients of 1e30 overflow nowhere on the way.
TEST_P(ThroughStatisticsTest, HugeGradients) {
  if (type() == Type::kHalf) {
    GTEST_SKIP() << "holds no such values";
  }
  for (const Shape& shape : layouts()) {
    const auto layer = layer_of(shape, 0);
    auto call = call_of(shape, 0, layer);
    for (double& dy : call.dy) {
      dy *= 1e30;
    }
    call.dy = rounded(type(), call.dy);
    const auto result = run_backward(table(), call).gradients;
    const auto expected = gradients_through_statistics(shape, call.dy, call.x, call.y, layer);
    SCOPED_TRACE(describe(call));
    std::vector<double> tolerances;
    for (const double dx : expected.dx) {
      tolerances.push_back(4e30 * unit_tolerance(type()) + (size_of(type()) == 2 ? spacing(type(), dx) : 0));
    }
    EXPECT_TRUE(each_near(result.dx, expected.dx, tolerances));
  }
}

/// A process of a group may be without values.
TEST_P(ThroughStatisticsTest, NoValues) {
  const Shape shape = {0, 5, 1};
  BackwardCall call;
  call.type = type();
  call.shape = shape;
  call.gradient = Gradient::kThroughStatisticsInHalves;
  call.saved = layer_of({7, 5, 1}, 0).saved;
  Buffer sums(Type::kDouble, 2 * shape.channels);
  Buffer saved(accumulate_type(type()), call.saved);
  BackwardArgs args = {};
  args.type = type();
  args.shape = shape;
  args.dy = args.x = args.dx = saved.data();
  args.saved = saved.data();
  args.sums = static_cast<double*>(sums.data());
  args.parallel_for = serial;
  table().gradient_sums(args);
  EXPECT_EQ(sums.values(), std::vector<double>(10, 0));
  table().gradient_of_input(args);
  EXPECT_EQ(saved.values(), call.saved);
}

MOMENTUM_BN_FOR_EVERY_KERNEL(ThroughStatisticsTest);
MOMENTUM_BN_FOR_EVERY_KERNEL(MaskFromXTest);

}  // namespace
}  // namespace momentum_bn::kernels::test
