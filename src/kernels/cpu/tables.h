#pragma once

#include "kernels/cpu/kernels.h"

namespace momentum_bn::kernels {

// Each instruction set has its table of kernels, table_DEFAULT() and so on, in an object library of its own.
// CMakeLists.txt writes the list that is included here.
#define MOMENTUM_BN_INSTRUCTION_SET(name, runs_here) const KernelTable& table_##name();
#include "kernels/cpu/instruction_sets.inc"
#undef MOMENTUM_BN_INSTRUCTION_SET

}  // namespace momentum_bn::kernels
