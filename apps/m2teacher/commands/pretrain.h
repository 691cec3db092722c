#pragma once

#include "training/pretrainer.h"

#include <filesystem>

namespace m2teacher {

inline constexpr const char* kCheckpointFile = "checkpoint.safetensors";
inline constexpr const char* kMetricsFile = "metrics.csv";

struct PretrainCommand {
  DataOptions data;
  std::filesystem::path out;
  PretrainOptions recipe = fashion_mnist_recipe();
  int64_t eval_every = 250;  ///< steps between two looks at the teacher's accuracy; 0: none
};

/// Trains a pair and leaves metrics.csv and checkpoint.safetensors in `out`.
/// @throws UserError
void run_pretrain(const PretrainCommand& command);

}  // namespace m2teacher
