#pragma once

#include "commands/evaluation.h"

#include <filesystem>

namespace m2teacher {

struct FeaturesCommand {
  EvaluationSource source;
  BranchImpl::Side side = BranchImpl::Side::Teacher;
  std::filesystem::path out;
};

/// Writes, for the training set and the test set as far as they are there, SET-features.npy, (N, F) float32,
/// SET-labels.npy, (N) int64, and where each image has a file of its own SET-files.txt, whose lines are the paths of
/// the N rows, into the folder `out`; SET is "train" or "test". classes.txt there has the names of the classes, the
/// first line that of label 0. An image without a label has -1. Images that cannot be read are left out.
/// @throws UserError
void run_features(const FeaturesCommand& command);

}  // namespace m2teacher
