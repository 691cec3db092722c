#pragma once

#include <filesystem>

namespace m2teacher {

struct InfoCommand {
  std::filesystem::path checkpoint;  ///< or the folder of a run
  bool tensors = false;              ///< list every one
};

/// Prints how far the run of a checkpoint is, what it was trained on, its settings, and what tensors there are.
/// @throws UserError
void run_info(const InfoCommand& command);

}  // namespace m2teacher
