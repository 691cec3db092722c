#include "checkpoint/run_folder.h"

#include "error.h"
#include "output/atomic_file.h"

#include <fcntl.h>
#include <sys/file.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <string_view>
#include <utility>

namespace m2teacher {
namespace {

constexpr std::string_view kPrefix = "checkpoint-";
constexpr std::string_view kSuffix = ".safetensors";
constexpr size_t kStepDigits = 8;  // so that names sort as steps do

/// The step in the name of a checkpoint; -1 if it is no such name.
int64_t step_of(std::string_view name) {
  if (!name.starts_with(kPrefix) || !name.ends_with(kSuffix) || name.size() <= kPrefix.size() + kSuffix.size()) {
    return -1;
  }
  const std::string_view digits = name.substr(kPrefix.size(), name.size() - kPrefix.size() - kSuffix.size());
  int64_t step = -1;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), step);
  return error == std::errc() && end == digits.data() + digits.size() ? step : -1;
}

/// Whether a run writes an `AtomicFile` of this name into its folder.
bool is_file_of_run(std::string_view name) { return name == kConfigFile || name == kProbeFile || step_of(name) >= 0; }

}  // namespace

std::vector<CheckpointFile> list_checkpoints(const std::filesystem::path& folder) {
  std::vector<CheckpointFile> found;
  std::error_code error;  // a folder that is not there holds none
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    const int64_t step = step_of(entry.path().filename().string());
    if (step >= 0) {
      found.push_back({entry.path(), step});
    }
  }
  std::sort(found.begin(), found.end(),
            [](const CheckpointFile& a, const CheckpointFile& b) { return a.step > b.step; });
  return found;
}

bool holds_run(const std::filesystem::path& folder) {
  return std::filesystem::exists(folder / kConfigFile) || std::filesystem::exists(folder / kMetricsFile) ||
         !list_checkpoints(folder).empty();
}

RunFolder::RunFolder(std::filesystem::path path) : path_(std::move(path)) {
  make_writable_folder(path_);
  lock_ = FileDescriptor(path_, O_RDONLY | O_DIRECTORY);
  if (!lock_.is_open()) {
    throw UserError(path_.string() + ": cannot be opened: " + std::strerror(errno));
  }
  // Not every file system can lock a folder; there nobody is kept out.
  if (flock(lock_.get(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
    throw UserError(path_.string() + ": another process is training in this folder");
  }
  remove_temporary_files(path_, is_file_of_run);
}

std::filesystem::path RunFolder::checkpoint(int64_t step) const {
  std::string digits = std::to_string(step);
  digits.insert(0, kStepDigits - std::min(kStepDigits, digits.size()), '0');
  return path_ / (std::string(kPrefix) + digits + std::string(kSuffix));
}

void RunFolder::clear() const {
  for (const CheckpointFile& file : list_checkpoints(path_)) {
    std::filesystem::remove(file.path);
  }
  std::filesystem::remove(config());
  std::filesystem::remove(metrics());
}

void RunFolder::keep_last(int64_t keep, int64_t step) const {
  for (const CheckpointFile& file : list_checkpoints(path_)) {
    if (file.step <= step && --keep < 0) {
      std::filesystem::remove(file.path);
    }
  }
}

}  // namespace m2teacher
