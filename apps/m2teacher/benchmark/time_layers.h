#pragma once

#include "training/pretrainer.h"

namespace m2teacher {

struct TimeLayersCommand {
  DataOptions data;
  PretrainOptions recipe;
  int64_t rounds = 25;
};

/// Prints a table: time of the teacher's two forwards and of a whole training step with the published formulas, with
/// plain BatchNorm and with Momentum BatchNorm in the teacher. One process, the three taking turns, medians.
/// @throws UserError
void run_time_layers(const TimeLayersCommand& command);

}  // namespace m2teacher
