#pragma once

#include "output/file_descriptor.h"

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>

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
  void write_buffer();

  std::filesystem::path path_;
  std::string temporary_;
  FileDescriptor file_;
  std::string buffer_;  // a checkpoint has many small tensors
};

/// Writes a text as an `AtomicFile`. @throws UserError
void write_text_file(const std::filesystem::path& path, const std::string& text);

/// Removes the temporary files of some `AtomicFile`s in the folder, which processes left that were killed while they
/// wrote. Says on stderr what cannot be removed. Only for whoever owns the folder: a file that is just being written
/// would go, too.
/// @param is_ours  whether an `AtomicFile` of that name is the caller's; all others stay, as do links and folders
void remove_temporary_files(const std::filesystem::path& folder, bool (*is_ours)(std::string_view name));

/// What `make_writable_folder` tries to make is an `AtomicFile` of this name.
inline constexpr std::string_view kProbeFile = "writable";

/// Makes the folder, and those above it, if need be, and sees that files can be made in it.
/// @throws UserError
void make_writable_folder(const std::filesystem::path& folder);

}  // namespace m2teacher
