#pragma once

#include "output/file_descriptor.h"
#include "training/pretrainer.h"

#include <filesystem>
#include <optional>
#include <string>

namespace m2teacher {

/// How far a metrics.csv is: what a checkpoint must hold for the file to go on without gap or double.
struct MetricsState {
  int64_t rows = 0;
  int64_t loss_count = 0;  ///< steps since the last row
  double loss_sum = 0;     ///< of these
};

/// metrics.csv of a run: one row per few steps, its losses averaged since the row before. Every column depends on the
/// run alone, but for the last two, which hold times: `seconds` spent in training steps so far, and `images_per_second`
/// since the row before.
class MetricsFile {
 public:
  /// Starts the file anew. @throws UserError
  explicit MetricsFile(const std::filesystem::path& path);
  /// Goes on with a file, after the `state.rows` rows that it had then: what follows these belongs to steps that are
  /// about to be done again, and is cut off.
  /// @throws UserError  it cannot be written, is no such file, or has lost rows
  MetricsFile(const std::filesystem::path& path, const MetricsState& state);

  /// Reads the loss. @param images   seen in the step
  /// @param seconds  that it took
  void add(const StepReport& report, int64_t images, double seconds);
  /// @param knn  accuracy in percent, where it was measured
  /// @throws UserError
  void write_row(int64_t images_seen, std::optional<double> knn);

  const MetricsState& state() const { return state_; }
  /// Returns once all rows are on the disk. @throws UserError
  void flush();

 private:
  [[noreturn]] void fail() const;
  void append(const std::string& text);

  std::string path_;
  FileDescriptor file_;
  MetricsState state_;
  StepReport last_;
  double seconds_ = 0;
  double seconds_since_row_ = 0;
  int64_t images_since_row_ = 0;
};

}  // namespace m2teacher
