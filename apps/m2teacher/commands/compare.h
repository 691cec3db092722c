#pragma once

#include "commands/evaluation.h"

#include <cstdint>

namespace m2teacher {

struct CompareCommand {
  EvaluationSource source;
  uint64_t seed = 0;
};

/// Prints a table: raw pixels, an untrained encoder, student and teacher by every evaluation. A dash stands where a
/// class has too few labels. @throws UserError
void run_compare(const CompareCommand& command);

}  // namespace m2teacher
