#pragma once

#include "training/pretrainer.h"

#include <filesystem>
#include <fstream>
#include <optional>

namespace m2teacher {

/// metrics.csv of a run: one row per few steps, its losses averaged since the row before.
class MetricsFile {
 public:
  /// Starts the file anew. @throws UserError
  explicit MetricsFile(const std::filesystem::path& path);

  void add(const StepReport& report);
  /// @param knn  accuracy in percent, where it was measured
  /// @throws UserError
  void write_row(int64_t images_seen, double images_per_second, std::optional<double> knn);

 private:
  std::filesystem::path path_;
  std::ofstream stream_;
  StepReport last_;
  double loss_sum_ = 0;
  int64_t loss_count_ = 0;
};

}  // namespace m2teacher
