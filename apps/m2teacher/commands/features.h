#pragma once

#include "commands/evaluation.h"

#include <filesystem>

namespace m2teacher {

struct FeaturesCommand {
  EvaluationSource source;
  BranchImpl::Side side = BranchImpl::Side::Teacher;
  std::filesystem::path out;
};

/// Writes, for the training set and the test set as far as they are there, SET-features.npy, (N, F) float32, and
/// SET-labels.npy, (N) int64, into the folder `out`; SET is "train" or "test". Images that cannot be read are left out.
/// @throws UserError
void run_features(const FeaturesCommand& command);

}  // namespace m2teacher
