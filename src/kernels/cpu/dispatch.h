#pragma once

#include "kernels/cpu/kernels.h"

#include <string>

namespace momentum_bn::kernels {

/// Returns the kernels for the instruction set that torch runs with, which ATEN_CPU_CAPABILITY can lower. They are
/// chosen once.
const KernelTable& table();

/// Names the instruction sets, for example "DEFAULT AVX2 AVX512".
std::string built_capabilities();
std::string capability_in_use();

}  // namespace momentum_bn::kernels
