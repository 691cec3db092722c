#include "kernels/cpu/dispatch.h"

#include "kernels/cpu/tables.h"

#include <ATen/Version.h>

namespace momentum_bn::kernels {

namespace {

struct Choice {
  const char* name;
  const KernelTable* table;
};

Choice choose() {
#ifdef MOMENTUM_BN_X86_KERNELS
  const auto capability = at::get_cpu_capability();
  if (capability == "AVX512") return {"AVX512", &table_AVX512()};
  if (capability == "AVX2") return {"AVX2", &table_AVX2()};
#endif
  return {"DEFAULT", &table_DEFAULT()};
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

const KernelTable& table() { return *chosen().table; }

std::string capability_in_use() { return chosen().name; }

std::string built_capabilities() {
#ifdef MOMENTUM_BN_X86_KERNELS
  return "DEFAULT AVX2 AVX512";
#else
  return "DEFAULT";
#endif
}

}  // namespace momentum_bn::kernels
