#include "instruction_sets.h"

#include "kernels/cpu/tables.h"

namespace momentum_bn::kernels::test {

const std::vector<InstructionSet>& built_instruction_sets() {
  static const std::vector<InstructionSet> sets = {
#define MOMENTUM_BN_INSTRUCTION_SET(name, runs_here) {#name, &table_##name(), runs_here},
#include "kernels/cpu/instruction_sets.inc"
#undef MOMENTUM_BN_INSTRUCTION_SET
  };
  return sets;
}

void EveryKernel::SetUp() {
  const InstructionSet& set = std::get<0>(GetParam());
  if (!set.runs_here) {
    GTEST_SKIP() << "this processor does not have " << set.name;
  }
}

}  // namespace momentum_bn::kernels::test
