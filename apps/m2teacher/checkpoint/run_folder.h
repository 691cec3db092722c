#pragma once

#include "output/file_descriptor.h"

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace m2teacher {

inline constexpr const char* kConfigFile = "config.toml";
inline constexpr const char* kMetricsFile = "metrics.csv";

/// A checkpoint in the folder of a run.
struct CheckpointFile {
  std::filesystem::path path;
  int64_t step = 0;
};

/// Checkpoints in the folder, regular files that are named so, the newest first. None where there is no folder.
/// @throws UserError  the folder cannot be read
std::vector<CheckpointFile> list_checkpoints(const std::filesystem::path& folder);

/// Whether the folder holds anything of a run.
bool holds_run(const std::filesystem::path& folder);

/// The folder of a run: config.toml, metrics.csv and checkpoint-STEP.safetensors, of which the last few are kept. One
/// process at a time may train in it.
class RunFolder {
 public:
  /// Makes the folder if need be and locks it until this goes or the process ends, however it ends.
  /// @throws UserError  it cannot be made or written, or another process holds it
  explicit RunFolder(std::filesystem::path path);

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path config() const { return path_ / kConfigFile; }
  std::filesystem::path metrics() const { return path_ / kMetricsFile; }
  std::filesystem::path checkpoint(int64_t step) const;

  /// Whether the path still leads to the folder that was locked. One that was removed, moved or made anew may be
  /// another run's.
  /// @throws UserError  the system does not say
  bool is_still_ours() const;
  /// @throws UserError  it is not, or the system does not say
  void check_still_ours() const;

  /// Removes everything of a run that the folder holds, and nothing else.
  void clear() const;
  /// Removes all checkpoints up to `step` but the last `keep`. Says on stderr which cannot be removed.
  void keep_last(int64_t keep, int64_t step) const;

 private:
  std::filesystem::path path_;
  FileDescriptor lock_;
};

}  // namespace m2teacher
