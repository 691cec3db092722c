#include "checkpoint/run_folder.h"

#include "error.h"
#include "output/atomic_file.h"
#include "text/parse_number.h"
#include "text/printable.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iostream>
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
  return parse_number<int64_t>(digits).value_or(-1);
}

/// Whether a run writes an `AtomicFile` of this name into its folder.
bool is_file_of_run(std::string_view name) { return name == kConfigFile || name == kProbeFile || step_of(name) >= 0; }

}  // namespace

std::vector<CheckpointFile> list_checkpoints(const std::filesystem::path& folder) {
  std::vector<CheckpointFile> found;
  std::error_code error;
  std::filesystem::directory_iterator entry(folder, error);
  for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    const int64_t step = step_of(entry->path().filename().string());
    std::error_code gone;
    if (step >= 0 && entry->is_regular_file(gone)) {
      found.push_back({entry->path(), step});
    }
  }
  if (error && error != std::errc::no_such_file_or_directory) {
    throw UserError(folder.string() + ": cannot be searched for checkpoints: " + error.message());
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

bool RunFolder::is_still_ours() const {
  struct stat there = {};
  struct stat ours = {};
  const bool found = stat(path_.c_str(), &there) == 0;
  if ((!found && errno != ENOENT && errno != ENOTDIR) || fstat(lock_.get(), &ours) != 0) {
    throw UserError(path_.string() + ": cannot be looked at: " + std::strerror(errno));
  }
  return found && there.st_dev == ours.st_dev && there.st_ino == ours.st_ino;
}

void RunFolder::check_still_ours() const {
  if (!is_still_ours()) {
    throw UserError(path_.string() +
                    ": is no longer the folder that this run was started in: it was removed, moved or "
                    "made anew");
  }
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
      std::error_code error;
      std::filesystem::remove(file.path, error);
      if (error) {
        std::cerr << "m2teacher: warning: " << printable(file.path.string())
                  << ": cannot be removed: " << error.message() << '\n';
      }
    }
  }
}

}  // namespace m2teacher
