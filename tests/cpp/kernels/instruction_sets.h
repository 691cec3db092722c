#pragma once

#include "buffer.h"
#include "kernels/cpu/kernels.h"

#include <gtest/gtest.h>

#include <ostream>
#include <string>
#include <tuple>
#include <vector>

namespace momentum_bn::kernels {

/// How googletest prints a parameter.
inline void PrintTo(Type type, std::ostream* out) { *out << test::name_of(type); }

}  // namespace momentum_bn::kernels

namespace momentum_bn::kernels::test {

struct InstructionSet {
  std::string name;
  const KernelTable* table;
  bool runs_here;
};

/// All that were built, also those that this processor lacks.
const std::vector<InstructionSet>& built_instruction_sets();

inline std::ostream& operator<<(std::ostream& out, const InstructionSet& set) { return out << set.name; }

/// Runs each test with every instruction set and type of value; skips, saying why, what the processor lacks.
class EveryKernel : public testing::TestWithParam<std::tuple<InstructionSet, Type>> {
 protected:
  void SetUp() override;
  const KernelTable& table() const { return *std::get<0>(GetParam()).table; }
  Type type() const { return std::get<1>(GetParam()); }
};

/// Instantiates the tests of a class that is derived from EveryKernel.
#define MOMENTUM_BN_FOR_EVERY_KERNEL(Class)                                                         \
  INSTANTIATE_TEST_SUITE_P(                                                                         \
      , Class,                                                                                      \
      testing::Combine(testing::ValuesIn(built_instruction_sets()),                                 \
                       testing::Values(Type::kFloat, Type::kDouble, Type::kBFloat16, Type::kHalf)), \
      [](const auto& info) { return std::get<0>(info.param).name + "_" + name_of(std::get<1>(info.param)); })

}  // namespace momentum_bn::kernels::test
