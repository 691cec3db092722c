#pragma once

#include "training/pretrainer.h"

namespace m2teacher {

struct TimeLayersCommand {
  DataOptions data;
  PretrainOptions recipe;
  int64_t rounds = 25;
};

/// Prints a table: time of the teacher's two forwards and of a whole training step with the published formulas and with
/// torch's BatchNorm in the teacher, with Momentum BatchNorm in it, and with this library's layers in both networks.
/// One process, all taking turns, medians.
/// @throws UserError
void run_time_layers(const TimeLayersCommand& command);

}  // namespace m2teacher
