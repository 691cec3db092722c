#pragma once

#include "kernels/cpu/kernels.h"

#include <gtest/gtest.h>

#include <vector>

namespace momentum_bn::kernels::test {

/// The distance to the next value of `type` above |value|.
double spacing(Type type, double value);

/// A float or double within `tolerance` of what is expected; a 16-bit value within one spacing of it besides, as it may
/// be rounded to either side. NaN and infinities must be the same.
testing::AssertionResult near(Type type, const std::vector<double>& values, const std::vector<double>& expected,
                              double tolerance);

/// Each value within its own tolerance.
testing::AssertionResult each_near(const std::vector<double>& values, const std::vector<double>& expected,
                                   const std::vector<double>& tolerances);

/// What rounding in the type that `type` is computed in may cost at unit scale.
double unit_tolerance(Type type);

}  // namespace momentum_bn::kernels::test
