#pragma once

#include "data/data_options.h"
#include "eval/knn.h"
#include "eval/linear.h"
#include "models/branch.h"

#include <filesystem>
#include <vector>

namespace m2teacher {

/// An encoder out of a checkpoint, and the images to try it on.
struct EncoderSource {
  DataOptions data;
  std::filesystem::path checkpoint;
  BranchImpl::Side side = BranchImpl::Side::Teacher;
};

struct KnnCommand {
  EncoderSource source;
  KnnOptions options;
  double shift = 0;  ///< shifts and flips all images first, see `shift_and_flip`; 0: leaves them as they are
  uint64_t seed = 0;
};

/// Prints the accuracy of weighted nearest neighbours. @throws UserError
void run_knn(const KnnCommand& command);

struct LinearCommand {
  EncoderSource source;
  std::vector<int64_t> labels_per_class = {0, 100, 10};  ///< 0: all
  uint64_t seed = 0;
};

/// Prints the accuracy of linear probes. @throws UserError
void run_linear(const LinearCommand& command);

struct CompareCommand {
  DataOptions data;
  std::filesystem::path checkpoint;
  uint64_t seed = 0;
};

/// Prints a table: raw pixels, an untrained encoder, student and teacher by every evaluation. @throws UserError
void run_compare(const CompareCommand& command);

struct NeighboursCommand {
  EncoderSource source;
  std::filesystem::path out;
  int64_t queries = 10;
  int64_t neighbours = 8;
};

/// Writes a safetensors file with test images and their nearest training images: "images" (queries, 1 + neighbours, H,
/// W) uint8, the test image first, and "labels" (queries, 1 + neighbours) int64. @throws UserError
void run_neighbours(const NeighboursCommand& command);

}  // namespace m2teacher
