#pragma once

#include "devices.h"
#include "emulator.h"

#include <gtest/gtest.h>

#include <string>
#include <tuple>

namespace momentum_bn::kernels::cuda::test {

/// Run once for every type and every way through the kernels.
class EveryWay : public testing::TestWithParam<std::tuple<Type, NamedDevice>> {
 protected:
  Type type() const { return std::get<0>(GetParam()); }
  const Device& device() const { return std::get<1>(GetParam()).device; }
  void TearDown() override { emulator::set_order(0); }
};

/// Devices on which the test shapes go the ways there are forward.
const std::vector<NamedDevice>& forward_ways();
/// And backward, with constant statistics: there is one.
const std::vector<NamedDevice>& backward_ways();

std::string name_of_way(const testing::TestParamInfo<std::tuple<Type, NamedDevice>>& info);

#define MOMENTUM_BN_FOR_WAYS(Test, ways)                                                           \
  INSTANTIATE_TEST_SUITE_P(                                                                        \
      , Test,                                                                                      \
      testing::Combine(testing::Values(Type::kFloat, Type::kDouble, Type::kBFloat16, Type::kHalf), \
                       testing::ValuesIn(ways)),                                                   \
      name_of_way)

}  // namespace momentum_bn::kernels::cuda::test
