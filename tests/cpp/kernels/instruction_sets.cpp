#include "instruction_sets.h"

#include "kernels/cpu/tables.h"

namespace momentum_bn::kernels::test {

const std::vector<InstructionSet>& built_instruction_sets() {
  static const std::vector<InstructionSet> sets = {
      {"DEFAULT", &table_DEFAULT(), true},
#ifdef MOMENTUM_BN_X86_KERNELS
      {"AVX2", &table_AVX2(),
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
      {"AVX512", &table_AVX512(),
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq")},
#endif
  };
  return sets;
}

void EveryKernel::SetUp() {
  const InstructionSet& set = std::get<0>(GetParam());
  if (!set.runs_here) GTEST_SKIP() << "this processor does not have " << set.name;
}

}  // namespace momentum_bn::kernels::test
