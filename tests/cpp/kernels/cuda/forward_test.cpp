// Statistics, blend and normalisation of the CUDA kernels against float64.

#include "buffer.h"
#include "compare.h"
#include "inputs.h"
#include "kernels/cuda/launch.h"
#include "layer.h"
#include "ways.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace momentum_bn::kernels::cuda::test {
namespace {

using kernels::test::each_near;
using kernels::test::exact_mean;
using kernels::test::exact_statistics;
using kernels::test::forward_inputs;
using kernels::test::layouts;
using kernels::test::near;
using kernels::test::rounded;
using kernels::test::shapes_for_exact_sums;
using kernels::test::sizes;
using kernels::test::uniform;
using kernels::test::unit_tolerance;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

class CudaForwardTest : public EveryWay {
 protected:
  Type kept() const { return kernels::test::accumulate_type(type()); }

  /// Of a layer that does not track, with weight and bias.
  ForwardCall call_of(const Shape& shape, double mean) const {
    ForwardCall call{forward_inputs(type(), shape, mean)};
    call.weight = rounded(kept(), uniform(shape.channels, -1, 1, 11));
    call.bias = rounded(kept(), uniform(shape.channels, -0.5, 0.5, 12));
    call.options.variance = Variance::Biased;
    return call;
  }

  void check_saved(const ForwardCall& call, const std::vector<double>& saved, const std::vector<double>& expected,
                   double tolerance) const {
    const auto channels = static_cast<size_t>(call.shape.channels);
    std::vector<double> values;
    std::vector<double> exact;
    std::vector<double> tolerances;
    for (size_t c = 0; c < channels; ++c) {
      const double rstd = expected[2 * channels + c];
      values.insert(values.end(), {saved[c] + saved[channels + c], saved[2 * channels + c]});
      exact.insert(exact.end(), {expected[c], rstd});
      tolerances.insert(tolerances.end(), {tolerance / rstd, tolerance * rstd});
      if (!call.through_statistics) {
        continue;
      }
      for (size_t i = (3 * channels) + c; i < 6 * channels; i += channels) {
        values.push_back(saved[i]);
        exact.push_back(expected[i]);
        tolerances.push_back(i < 4 * channels ? tolerance / rstd : tolerance * expected[i]);
      }
    }
    EXPECT_TRUE(each_near(values, exact, tolerances)) << "saved";
  }

  void check(const ForwardCall& call, LayerState state, double tolerance) const {
    SCOPED_TRACE(describe(call));
    auto expected_state = state;
    const auto result = run_forward(call, state, device());
    const auto expected = expected_forward(call, expected_state);
    EXPECT_TRUE(near(type(), result.y, expected.y, tolerance)) << "y";
    check_saved(call, result.saved, expected.saved, tolerance);
    if (!call.functional_momentum) {
      return;
    }
    EXPECT_TRUE(near(kept(), result.batch_mean, expected.batch_mean, tolerance)) << "batch_mean";
    EXPECT_TRUE(near(kept(), result.batch_var, expected.batch_var, 4 * tolerance)) << "batch_var";
    EXPECT_EQ(state.running_mean, expected_state.running_mean);
    EXPECT_EQ(state.running_var, expected_state.running_var);
    EXPECT_EQ(state.num_batches_tracked, expected_state.num_batches_tracked);
  }

  /// Of a channel, whether its values of y are NaN or infinite throughout; all others must be finite.
  void expect_spoilt(const ForwardCall& call, const std::vector<double>& y, int64_t channel) const {
    for (size_t i = 0; i < y.size(); ++i) {
      const bool spoilt = static_cast<int64_t>(i) / call.shape.inner % call.shape.channels == channel;
      if (spoilt == std::isfinite(y[i])) {
        ADD_FAILURE() << "y[" << i << "] is " << y[i];
        return;
      }
    }
  }
};

/// Eight calls with each combination of relu, residual and in place.
template <typename Run>
void for_flags(ForwardCall call, const Run& run) {
  const auto residual = rounded(call.type, uniform(call.shape.values(), -1, 1, 2));
  for (int flags = 0; flags < 8; ++flags) {
    call.relu = flags & 1;
    call.residual = flags & 2 ? residual : std::vector<double>();
    call.in_place = flags & 4;
    call.offset = flags % 3 == 1 ? 1 : flags % 3 == 2 ? 4 : 0;
    emulator::set_order(static_cast<uint64_t>(flags));
    run(call);
  }
}

TEST_P(CudaForwardTest, EveryCombinationInEveryLayout) {
  for (const Shape& shape : layouts()) {
    for_flags(call_of(shape, 0.3), [&](const ForwardCall& call) { check(call, {}, unit_tolerance(type())); });
  }
}

TEST_P(CudaForwardTest, EverySize) {
  int flags = 0;
  for (const Shape& shape : sizes()) {
    if (shape.values_per_channel() < 2 || shape.values() > 20'000) {
      continue;
    }
    auto call = call_of(shape, -0.2);
    ++flags;
    call.relu = flags % 2 == 1;
    if (flags % 3 == 0) {
      call.residual = rounded(type(), uniform(shape.values(), -1, 1, 2));
    }
    call.in_place = flags % 5 < 3;
    call.offset = flags % 7 == 6 ? 1 : 0;
    // Of two values, as above: a variance near 0 makes their difference's rounding large.
    call.options.eps = 0.1;
    check(call, {}, unit_tolerance(type()));
  }
}

/// More than a thread reads at once, of several tiles, with more values than the cache holds.
TEST_P(CudaForwardTest, ManySlices) {
  Device many = device();
  if (many.shared_memory_per_block > 0) {
    GTEST_SKIP() << "slices are merged in two launches alone";
  }
  many.multiprocessors = 64;
  const Shape shape = {32'768, 72, 1};
  const auto tiling = tiling_of(shape, vector_of(type(), shape, {}), many);
  EXPECT_GT(tiling.slices, 8 * tiling.threads() / tiling.channels_per_tile);
  EXPECT_GT(tiling.tiles, 1);
  EXPECT_TRUE(overflows_cache(type(), shape, many));
  const auto call = call_of(shape, 0.4);
  LayerState state;
  auto expected_state = state;
  const auto result = run_forward(call, state, many);
  const auto expected = expected_forward(call, expected_state);
  EXPECT_TRUE(near(type(), result.y, expected.y, unit_tolerance(type()))) << "y";
  check_saved(call, result.saved, expected.saved, unit_tolerance(type()));
}

/// Ten thousand standard deviations away, in the 16-bit types as far as their values go.
TEST_P(CudaForwardTest, FarFromZero) {
  const double offset = type() == Type::kBFloat16 ? 64 : type() == Type::kHalf ? 512 : 1e4;
  // The mean of doubles so far away is rounded by 1e-12.
  const double tolerance = type() == Type::kDouble ? 4e-11 : 1e-6;
  for (const Shape& shape : layouts()) {
    for (const double mean : {offset, -offset}) {
      check(call_of(shape, mean), {}, tolerance);
    }
  }
}

/// Whatever value the sums are formed around, here those that are a thousand deviations away.
TEST_P(CudaForwardTest, FirstValuesFarFromTheOthers) {
  if (type() == Type::kHalf || type() == Type::kBFloat16) {
    GTEST_SKIP() << "enough with the wider types";
  }
  for (const Shape& shape : layouts()) {
    if (shape.values_per_channel() < 64) {
      continue;
    }
    auto call = call_of(shape, 0);
    for (int64_t c = 0; c < shape.channels; ++c) {
      call.x[static_cast<size_t>(c * shape.inner)] = 1024;
    }
    check(call, {}, type() == Type::kDouble ? 1e-10 : 1.6e-4);  // of 80
  }
}

/// The mean of a constant is it, the deviation 0.
TEST_P(CudaForwardTest, ConstantChannels) {
  for (const Shape& shape : layouts()) {
    for (const double value : {0.0, 1.0, -3.3, 3000.7, 1e-7, -1e15}) {
      ForwardCall call = call_of(shape, 0);
      call.x = rounded(type(), std::vector<double>(static_cast<size_t>(shape.values()), value));
      if (std::isinf(call.x[0])) {
        continue;
      }
      SCOPED_TRACE(describe(call) + " of " + std::to_string(call.x[0]));
      const auto channels = static_cast<size_t>(shape.channels);
      std::vector<double> expected(2 * channels + 1);
      std::fill_n(expected.begin(), channels, call.x[0]);
      expected.back() = static_cast<double>(shape.values_per_channel());
      EXPECT_EQ(run_statistics(call, device()), expected);
    }
  }
}

/// Sums that nothing rounds: the same bits on every way, whichever block ends last.
TEST_P(CudaForwardTest, ExactSums) {
  uint64_t seed = 1;
  for (const Shape& shape : shapes_for_exact_sums()) {
    if (shape.values() > 100'000) {
      continue;
    }
    auto call = call_of(shape, 0);
    call.x = exact_statistics(shape, 7);
    SCOPED_TRACE(describe(call));
    emulator::set_order(++seed);
    EXPECT_EQ(run_statistics(call, device()), expected_statistics(shape, call.x));
    LayerState none;
    const auto saved = run_forward(call, none, device()).saved;
    for (int64_t c = 0; c < shape.channels; ++c) {
      EXPECT_EQ(saved[static_cast<size_t>(c)], exact_mean(c));
    }
  }
}

TEST_P(CudaForwardTest, SameBitsInEveryOrder) {
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, 0.3);
    LayerState none;
    emulator::set_order(0);
    const auto first = run_forward(call, none, device());
    const auto first_statistics = run_statistics(call, device());
    SCOPED_TRACE(describe(call));
    for (const uint64_t seed : {1, 2}) {
      emulator::set_order(seed);
      const auto again = run_forward(call, none, device());
      EXPECT_EQ(again.y, first.y);
      EXPECT_EQ(again.saved, first.saved);
      EXPECT_EQ(run_statistics(call, device()), first_statistics);
    }
  }
}

TEST_P(CudaForwardTest, Statistics) {
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, 3);
    for (const int64_t offset : {0, 1}) {
      call.offset = offset;
      SCOPED_TRACE(describe(call));
      const auto result = run_statistics(call, device());
      const auto expected = expected_statistics(shape, call.x);
      std::vector<double> tolerances;
      for (size_t i = 0; i < expected.size(); ++i) {
        tolerances.push_back(i + 1 == expected.size() ? 0 : unit_tolerance(type()) * std::max(1.0, expected[i]));
      }
      EXPECT_TRUE(each_near(result, expected, tolerances));
    }
  }
}

/// As large as the type holds: nothing overflows where the result itself does not.
TEST_P(CudaForwardTest, HugeValues) {
  if (type() == Type::kDouble) {
    GTEST_SKIP() << "there is no wider type to square the largest double in";
  }
  const double largest = type() == Type::kHalf ? 65504 : 3.3e38;
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, 0);
    call.weight.clear();
    for (double& value : call.x) {
      value *= largest / 5;
    }
    call.x = rounded(type(), call.x);
    check(call, {}, unit_tolerance(type()));
  }
}

TEST_P(CudaForwardTest, NaNAndInfinityStayInTheirChannel) {
  for (const Shape& shape : layouts()) {
    for (const double bad : {kNaN, kInfinity, -kInfinity}) {
      for (const int64_t where : {int64_t{0}, shape.values() / 2, shape.values() - 1}) {
        auto call = call_of(shape, 0);
        call.x[static_cast<size_t>(where)] = bad;
        call.relu = where > 0;
        SCOPED_TRACE(describe(call) + " at " + std::to_string(where) + " " + std::to_string(bad));
        LayerState none;
        expect_spoilt(call, run_forward(call, none, device()).y, where / shape.inner % shape.channels);
      }
    }
  }
}

/// relu(NaN) is NaN, relu(-inf) is 0.
TEST_P(CudaForwardTest, ReluOfWhatTheResidualHolds) {
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, 0);
    call.relu = true;
    call.residual.resize(call.x.size());
    for (size_t i = 0; i < call.residual.size(); ++i) {
      const double values[] = {kNaN, kInfinity, -kInfinity, 0.25};
      call.residual[i] = values[i % 4];
    }
    check(call, {}, unit_tolerance(type()));
  }
}

TEST_P(CudaForwardTest, WeightOfZeroLeavesTheBias) {
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, type() == Type::kHalf ? 100 : 1e4);
    call.weight.assign(call.weight.size(), 0);
    call.bias.assign(call.bias.size(), 1.25);
    SCOPED_TRACE(describe(call));
    LayerState none;
    EXPECT_TRUE(run_forward(call, none, device()).y == std::vector<double>(call.x.size(), 1.25));
  }
}

TEST_P(CudaForwardTest, WithoutWeightAndBias) {
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, 0);
    call.weight.clear();
    check(call, {}, unit_tolerance(type()));
    call.bias.clear();
    check(call, {}, unit_tolerance(type()));
  }
}

TEST_P(CudaForwardTest, PureFunction) {
  for (const Shape& shape : layouts()) {
    for (const auto variance : {Variance::Published, Variance::Unbiased, Variance::Biased}) {
      auto call = call_of(shape, 0);
      call.options.variance = variance;
      call.functional_momentum = 0.3;
      check(call, LayerState::used(type(), shape.channels), unit_tolerance(type()));
      call.functional_momentum = 1;
      check(call, {}, unit_tolerance(type()));
    }
  }
}

/// What gradients through the statistics are formed with.
TEST_P(CudaForwardTest, AllThatIsSaved) {
  for (const Shape& shape : layouts()) {
    for (const auto variance : {Variance::Published, Variance::Unbiased, Variance::Biased}) {
      auto call = call_of(shape, 3);
      call.options.variance = variance;
      call.through_statistics = true;
      check(call, {}, unit_tolerance(type()));
      check(call, LayerState::used(type(), shape.channels), unit_tolerance(type()));
      check(call, LayerState::used_batch_norm(type(), shape.channels), unit_tolerance(type()));
    }
  }
}

/// Of ranks with different numbers of values, one with none; x is then normalised with them, whatever it is.
TEST_P(CudaForwardTest, GatheredStatistics) {
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, 0);
    call.ranks = 4;
    for (int64_t rank = 0; rank < call.ranks; ++rank) {
      const double count = rank == 1 ? 0 : 50 + static_cast<double>(rank);
      const auto means = uniform(shape.channels, -1, 1, 61 + static_cast<uint64_t>(rank));
      const auto squares = uniform(shape.channels, 0.5 * count, 2 * count, 71);
      call.gathered.insert(call.gathered.end(), means.begin(), means.end());
      call.gathered.insert(call.gathered.end(), squares.begin(), squares.end());
      call.gathered.push_back(count);
    }
    call.relu = true;
    check(call, {}, unit_tolerance(type()));
    call.options.variance = Variance::Published;
    check(call, LayerState::used(type(), shape.channels), unit_tolerance(type()));
    call.through_statistics = true;
    check(call, LayerState::used(type(), shape.channels), unit_tolerance(type()));
  }
}

/// What is on chip takes one launch, and two where its clusters cannot be had; everything else two.
TEST_P(CudaForwardTest, Launches) {
  for (const Shape& shape : layouts()) {
    const auto call = call_of(shape, 0.3);
    const auto tiling = on_chip_tiling_of(type(), shape, vector_of(type(), shape, {}), device(), kKeptForward);
    const bool in_cluster = tiling && tiling->slices > 1;
    SCOPED_TRACE(describe(call));
    LayerState none;
    const auto before = emulator::launches();
    const auto usual = run_forward(call, none, device());
    EXPECT_EQ(emulator::launches() - before, tiling ? 1 : 2);
    if (!in_cluster) {
      continue;
    }
    emulator::refuse_clusters(true);
    EXPECT_TRUE(near(type(), run_forward(call, none, device()).y, usual.y, unit_tolerance(type())));
    emulator::refuse_clusters(false);
    EXPECT_EQ(emulator::launches() - before, 3);
  }
}

MOMENTUM_BN_FOR_WAYS(CudaForwardTest, forward_ways());

}  // namespace
}  // namespace momentum_bn::kernels::cuda::test
