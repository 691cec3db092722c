// Gradients and their sums of the CUDA kernels against float64.

#include "buffer.h"
#include "compare.h"
#include "inputs.h"
#include "layer.h"
#include "ways.h"

#include <cmath>
#include <limits>

namespace momentum_bn::kernels::cuda::test {
namespace {

using kernels::test::accumulate_type;
using kernels::test::backward_inputs;
using kernels::test::each_near;
using kernels::test::layouts;
using kernels::test::near;
using kernels::test::rounded;
using kernels::test::sizes;
using kernels::test::uniform;
using kernels::test::unit_tolerance;
using kernels::test::whole_numbers;

class CudaBackwardTest : public EveryWay {
 protected:
  BackwardCall call_of(const Shape& shape, double mean) const {
    BackwardCall call{backward_inputs(type(), shape, mean)};
    const Type kept = accumulate_type(type());
    call.saved = rounded(kept, uniform(shape.channels, mean - 0.1, mean + 0.1, 31));
    const auto rest = rounded(kept, uniform(shape.channels, -1e-4, 1e-4, 33));
    const auto rstd = rounded(kept, uniform(shape.channels, 0.5, 1.5, 34));
    call.saved.insert(call.saved.end(), rest.begin(), rest.end());
    call.saved.insert(call.saved.end(), rstd.begin(), rstd.end());
    call.weight = rounded(kept, uniform(shape.channels, -1, 1, 32));
    return call;
  }

  /// Sums of n numbers near 1, each rounded.
  void check_sums(const BackwardCall& call, const std::vector<double>& sums, const std::vector<double>& expected,
                  const char* name) const {
    const auto n = static_cast<double>(call.shape.values_per_channel());
    const std::vector<double> tolerances(expected.size(), unit_tolerance(type()) * n);
    EXPECT_TRUE(each_near(sums, expected, tolerances)) << name;
  }

  void check(const BackwardCall& call) const {
    SCOPED_TRACE(describe(call));
    const auto result = run_backward(call, device());
    const auto expected = expected_backward(call);
    EXPECT_TRUE(near(type(), result.dx, expected.dx, 4 * unit_tolerance(type()))) << "dx";
    EXPECT_EQ(result.dresidual, expected.dresidual);
    check_sums(call, result.dbias, expected.dbias, "dbias");
    check_sums(call, result.dweight, expected.dweight, "dweight");
  }
};

TEST_P(CudaBackwardTest, EveryCombinationInEveryLayout) {
  for (const Shape& shape : layouts()) {
    const auto all = call_of(shape, 0.3);
    for (unsigned flags = 0; flags < 16; ++flags) {
      auto call = all;
      if (flags & 1) {
        call.x.clear();
      }
      if (flags & 2) {
        call.y.clear();
      }
      call.with_dresidual = flags & 4;
      call.in_place = flags & 8;
      call.with_dx = call.in_place || flags % 3 != 1;
      call.with_dbias = flags % 5 != 2;
      if (flags % 5 == 3) {
        call.weight.clear();
      }
      call.offset = flags % 4 == 3 ? 1 : flags % 4 == 2 ? 4 : 0;
      emulator::set_order(flags);
      check(call);
    }
  }
}

TEST_P(CudaBackwardTest, EverySize) {
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
    call.with_dresidual = flags % 2 == 1;
    call.in_place = flags % 5 < 2;
    call.offset = flags % 7 == 6 ? 1 : 0;
    check(call);
  }
}

TEST_P(CudaBackwardTest, FarFromZero) {
  const double offset = type() == Type::kBFloat16 ? 64 : type() == Type::kHalf ? 512 : 1e4;
  if (type() == Type::kDouble) {
    GTEST_SKIP() << "enough with the narrower types";
  }
  for (const Shape& shape : layouts()) {
    check(call_of(shape, offset));
  }
}

/// Sums that nothing rounds.
TEST_P(CudaBackwardTest, ExactSums) {
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, 0);
    call.dy = whole_numbers(shape.values(), -3, 3, 41);
    call.x = whole_numbers(shape.values(), -7, 7, 42);
    const auto channels = static_cast<size_t>(shape.channels);
    for (size_t c = 0; c < channels; ++c) {
      call.saved[c] = static_cast<double>(c % 5);
      call.saved[channels + c] = 0;
      call.saved[2 * channels + c] = 0.5;
    }
    for (const uint64_t order : {1, 2}) {
      emulator::set_order(order);
      SCOPED_TRACE(describe(call));
      const auto result = run_backward(call, device());
      const auto expected = expected_backward(call);
      EXPECT_EQ(result.dbias, expected.dbias);
      EXPECT_EQ(result.dweight, expected.dweight);
    }
  }
}

TEST_P(CudaBackwardTest, SameBitsInEveryOrder) {
  for (const Shape& shape : layouts()) {
    const auto call = call_of(shape, 0.3);
    emulator::set_order(0);
    const auto first = run_backward(call, device());
    for (const uint64_t seed : {1, 2}) {
      emulator::set_order(seed);
      const auto again = run_backward(call, device());
      EXPECT_EQ(again.dweight, first.dweight);
      EXPECT_EQ(again.dbias, first.dbias);
      EXPECT_EQ(again.dx, first.dx);
    }
  }
}

/// Where y is NaN, nothing is masked.
TEST_P(CudaBackwardTest, MaskOfNaN) {
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape, 0);
    for (size_t i = 0; i < call.y.size(); i += 3) {
      call.y[i] = std::numeric_limits<double>::quiet_NaN();
    }
    call.with_dresidual = true;
    check(call);
  }
}

MOMENTUM_BN_FOR_WAYS(CudaBackwardTest, backward_ways());

}  // namespace
}  // namespace momentum_bn::kernels::cuda::test
