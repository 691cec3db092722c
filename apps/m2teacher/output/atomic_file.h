#pragma once

#include <cstddef>
#include <filesystem>
#include <string>

namespace m2teacher {

/// A file that appears under its name complete or not at all: written to a temporary file beside it, flushed to the
/// disk, then renamed. Without `commit` the temporary file vanishes.
class AtomicFile {
 public:
  /// @throws UserError  the folder cannot be written
  explicit AtomicFile(std::filesystem::path path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  /// @throws UserError  what could not be written, and why
  void write(const void* data, size_t size);
  void commit();

 private:
  [[noreturn]] void fail() const;

  std::filesystem::path path_;
  std::string temporary_;
  int descriptor_ = -1;
};

/// Makes the folder, and those above it, if need be, and sees that files can be made in it.
/// @throws UserError
void make_writable_folder(const std::filesystem::path& folder);

}  // namespace m2teacher
