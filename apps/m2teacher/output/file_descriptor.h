#pragma once

#include <cstddef>
#include <filesystem>

namespace m2teacher {

/// Lets calls that write into a pipe which nobody reads any more, or beyond the limit on a file's size, fail with errno
/// as all others do. By default a signal ends the process there, before a run could save a checkpoint.
void let_writes_fail();

/// A file opened for writing, closed when this goes. Failures are told by `false` and errno, as by the system's calls.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  /// @param flags  of open(2), such as O_WRONLY; the file stays closed in programs that this one starts
  FileDescriptor(const std::filesystem::path& path, int flags);
  ~FileDescriptor();
  FileDescriptor(FileDescriptor&& other) noexcept;
  FileDescriptor& operator=(FileDescriptor&& other) noexcept;

  bool is_open() const { return value_ >= 0; }
  int get() const { return value_; }

  /// Writes all of it.
  bool write(const void* data, size_t size) const;
  /// Brings what was written to the disk.
  bool flush() const;
  bool close();

 private:
  int value_ = -1;
};

}  // namespace m2teacher
