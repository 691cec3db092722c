#pragma once

#include "distributed/ranks.h"
#include "settings/run_settings.h"

#include <filesystem>
#include <string>

namespace m2teacher {

struct PretrainCommand {
  RunSettings settings;
  std::string device = "auto";   ///< as `choose_device` has it; no part of the run, which may go on on another one
  std::filesystem::path folder;  ///< of the run
  bool resume = false;           ///< go on with the run in the folder, whose settings these are
  bool overwrite = false;        ///< otherwise a folder that holds a run already is refused
};

/// Trains a pair. Leaves config.toml, metrics.csv and the last checkpoints in the folder of the run. SIGINT and SIGTERM
/// end it after the step at hand, with a checkpoint.
/// @param ranks  all of which call this. What the command of the first says counts; it alone reads and writes the
/// folder.
/// @throws UserError  the checkpoints that were saved until then stay
/// @throws ToldElsewhere
void run_pretrain(const PretrainCommand& command, const Ranks& ranks = {});

}  // namespace m2teacher
