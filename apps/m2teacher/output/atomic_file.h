#pragma once

#include "output/file_descriptor.h"

#include <cstddef>
#include <filesystem>
#include <string>

namespace m2teacher {

/// A file that appears under its name complete or not at all: written to a temporary file beside it, flushed to the
/// disk, then renamed. Without `commit` the temporary file vanishes.
class AtomicFile {
 public:
  /// @throws UserError  the folder cannot be written, or the path is something else than a regular file
  explicit AtomicFile(std::filesystem::path path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  /// @throws UserError  what could not be written, and why
  void write(const void* data, size_t size);
  /// Returns once the file and its name are on the disk. @throws UserError
  void commit();

 private:
  [[noreturn]] void fail() const;

  std::filesystem::path path_;
  std::string temporary_;
  FileDescriptor file_;
};

/// Writes a text as an `AtomicFile`. @throws UserError
void write_text_file(const std::filesystem::path& path, const std::string& text);

/// Removes the temporary files in the folder that processes left which were killed while they wrote. Only for whoever
/// owns the folder: a file that is just being written would go, too.
void remove_temporary_files(const std::filesystem::path& folder);

/// Makes the folder, and those above it, if need be, and sees that files can be made in it.
/// @throws UserError
void make_writable_folder(const std::filesystem::path& folder);

}  // namespace m2teacher
