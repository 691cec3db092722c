#pragma once

#include "commands/evaluation.h"
#include "eval/knn.h"

#include <cstdint>
#include <vector>

namespace m2teacher {

struct KnnCommand {
  EvaluationSource source;
  BranchImpl::Side side = BranchImpl::Side::Teacher;
  KnnOptions options;
  double shift = 0;  ///< shifts and flips all images first, see `shift_and_flip`; 0: leaves them as they are
  uint64_t seed = 0;
};

/// Prints the accuracy of weighted nearest neighbours. @throws UserError
void run_knn(const KnnCommand& command);

struct LinearCommand {
  EvaluationSource source;
  BranchImpl::Side side = BranchImpl::Side::Teacher;
  std::vector<int64_t> labels_per_class = {0, 100, 10};  ///< 0: all
  bool asked_for = false;  ///< labels that cannot be had are an error, and left out otherwise
  uint64_t seed = 0;
};

/// Prints the accuracy of linear probes. @throws UserError  among others where a class has fewer labels than were asked
/// for: before anything is encoded, unless it is an image that cannot be read that is missing
void run_linear(const LinearCommand& command);

}  // namespace m2teacher
