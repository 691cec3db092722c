#pragma once

#include "kernels/cpu/kernels.h"

namespace momentum_bn::kernels {

// The kernels of each instruction set: one per object library of CMakeLists.txt.
const KernelTable& table_DEFAULT();
#ifdef MOMENTUM_BN_X86_KERNELS
const KernelTable& table_AVX2();
const KernelTable& table_AVX512();
#endif

}  // namespace momentum_bn::kernels
