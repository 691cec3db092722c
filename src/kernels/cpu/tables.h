#pragma once

#include "kernels/cpu/kernels.h"

namespace momentum_bn::kernels {

// The kernels of each instruction set, table_DEFAULT() and so on: one per object library of CMakeLists.txt, which also
// writes the list that is included here.
#define MOMENTUM_BN_INSTRUCTION_SET(name, runs_here) const KernelTable& table_##name();
#include "kernels/cpu/instruction_sets.inc"
#undef MOMENTUM_BN_INSTRUCTION_SET

}  // namespace momentum_bn::kernels
