#pragma once

#include "models/branch.h"
#include "training/pretrainer.h"

#include <filesystem>
#include <string>

namespace m2teacher {

/// Writes student and teacher, whole, under "student." and "teacher.", with what is needed to build them again.
void save_checkpoint(const std::filesystem::path& path, Pretrainer& pretrainer);

/// What a checkpoint says of itself.
struct CheckpointInfo {
  EncoderOptions encoder;
};

/// @throws UserError  no sound checkpoint, or one of another program
CheckpointInfo read_checkpoint_info(const std::filesystem::path& path);

/// An encoder for evaluation out of a checkpoint, with torch's BatchNorm in evaluation mode.
/// @param side  which of the two networks
/// @throws UserError  no sound checkpoint, or one of another program or model
Encoder load_encoder(const std::filesystem::path& path, BranchImpl::Side side);

}  // namespace m2teacher
