#pragma once

#include "models/branch.h"

#include <filesystem>

namespace m2teacher {

struct ExportCommand {
  std::filesystem::path checkpoint;  ///< or the folder of a run
  BranchImpl::Side side = BranchImpl::Side::Teacher;
  std::filesystem::path out;
};

/// Writes the encoder of a checkpoint as a safetensors file: parameters and buffers under torchvision's names, of
/// BatchNorm the five that torch's has. What the input must look like is in the file's metadata.
/// @throws UserError
void run_export(const ExportCommand& command);

}  // namespace m2teacher
