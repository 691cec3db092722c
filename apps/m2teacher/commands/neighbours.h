#pragma once

#include "commands/evaluation.h"

#include <cstdint>
#include <filesystem>

namespace m2teacher {

struct NeighboursCommand {
  EvaluationSource source;
  BranchImpl::Side side = BranchImpl::Side::Teacher;
  std::filesystem::path out;
  int64_t queries = 10;
  int64_t neighbours = 8;
  uint64_t seed = 0;
};

/// Writes a safetensors file with images and those training images that the encoder finds nearest: "images" (queries,
/// 1 + neighbours, C, H, W) uint8, the image itself first, and where there are labels "labels" (queries, 1 +
/// neighbours) int64, with the classes' names in the metadata as a JSON list. The images are drawn by the seed, of
/// each class in turn, from the test set, or, where there is none, from the training set, which then are not their own
/// neighbours. @throws UserError
void run_neighbours(const NeighboursCommand& command);

}  // namespace m2teacher
