#pragma once

#include <momentum_bn/export.h>

#include <string>

namespace momentum_bn {

/// What was built and what runs: version, torch version, CPU instruction sets built and in use, accelerators, threads.
MOMENTUM_BN_API std::string show_config();

}  // namespace momentum_bn
