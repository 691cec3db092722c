#include "kernels/cpu/dispatch.h"

#include "kernels/cpu/tables.h"

#include <ATen/Version.h>

#include <vector>

namespace momentum_bn::kernels {

namespace {

struct InstructionSet {
  std::string name;
  const KernelTable* table;
};

/// Returns all that were built, the least first.
const std::vector<InstructionSet>& built() {
  static const std::vector<InstructionSet> sets = {
#define MOMENTUM_BN_INSTRUCTION_SET(name, runs_here) {#name, &table_##name()},
#include "kernels/cpu/instruction_sets.inc"
#undef MOMENTUM_BN_INSTRUCTION_SET
  };
  return sets;
}

const InstructionSet& choose() {
  const auto capability = at::get_cpu_capability();
  for (const auto& set : built()) {
    if (set.name == capability) {
      return set;
    }
  }
  return built().front();
}

const InstructionSet& chosen() {
  static const InstructionSet& choice = choose();
  return choice;
}

}  // namespace

const KernelTable& table() { return *chosen().table; }

std::string capability_in_use() { return chosen().name; }

std::string built_capabilities() {
  std::string names;
  for (const auto& set : built()) {
    names += (names.empty() ? "" : " ") + set.name;
  }
  return names;
}

}  // namespace momentum_bn::kernels
