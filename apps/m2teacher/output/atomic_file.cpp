#include "output/atomic_file.h"

#include "error.h"
#include "regular_file.h"
#include "text/printable.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <system_error>
#include <utility>

namespace m2teacher {
namespace {

constexpr std::string_view kTemporaryMark = ".tmp-";
constexpr size_t kBufferBytes = size_t{1} << 14;

/// The name under which a temporary file was to appear; empty: it is none.
std::string_view final_name(std::string_view temporary) {
  const size_t mark = temporary.rfind(kTemporaryMark);
  if (mark == std::string_view::npos) {
    return {};
  }
  const std::string_view process = temporary.substr(mark + kTemporaryMark.size());
  const bool number = !process.empty() && process.find_first_not_of("0123456789") == std::string_view::npos;
  return number ? temporary.substr(0, mark) : std::string_view();
}

/// A new name is on the disk only once its folder is. Not every file system can do that, which is no failure.
bool flush_folder(const std::filesystem::path& folder) {
  const FileDescriptor descriptor(folder.empty() ? "." : folder, O_RDONLY | O_DIRECTORY);
  return descriptor.is_open() && (descriptor.flush() || errno == EINVAL);
}

/// The path, unless something stands there that a file must not take the place of: a folder, a device, a pipe.
std::filesystem::path replaceable(std::filesystem::path path) {
  if (is_irregular(path)) {
    throw UserError(path.string() + ": cannot be written: it is there already and no regular file");
  }
  return path;
}

/// What stays does no harm but takes room.
void warn_of(const std::error_code& error, const std::filesystem::path& path) {
  if (error) {
    std::cerr << "m2teacher: warning: " << printable(path.string())
              << ": temporary files cannot be removed: " << error.message() << '\n';
  }
}

}  // namespace

AtomicFile::AtomicFile(std::filesystem::path path)
    : path_(replaceable(std::move(path))),
      temporary_(path_.string() + std::string(kTemporaryMark) + std::to_string(getpid())),
      file_(temporary_, O_WRONLY | O_CREAT | O_TRUNC) {
  if (!file_.is_open()) {
    fail();
  }
}

AtomicFile::~AtomicFile() {
  if (!temporary_.empty()) {
    unlink(temporary_.c_str());
  }
}

void AtomicFile::fail() const { throw UserError(path_.string() + ": cannot be written: " + std::strerror(errno)); }

void AtomicFile::write(const void* data, size_t size) {
  if (buffer_.size() + size > kBufferBytes) {
    write_buffer();
  }
  if (size > kBufferBytes) {
    if (!file_.write(data, size)) {
      fail();
    }
  } else {
    buffer_.append(static_cast<const char*>(data), size);
  }
}

void AtomicFile::write_buffer() {
  if (!file_.write(buffer_.data(), buffer_.size())) {
    fail();
  }
  buffer_.clear();
}

void AtomicFile::commit() {
  write_buffer();
  if (!file_.flush() || !file_.close() || rename(temporary_.c_str(), path_.c_str()) != 0) {
    fail();
  }
  temporary_.clear();
  if (!flush_folder(path_.parent_path())) {
    fail();
  }
}

void write_text_file(const std::filesystem::path& path, const std::string& text) {
  AtomicFile file(path);
  file.write(text.data(), text.size());
  file.commit();
}

void remove_temporary_files(const std::filesystem::path& folder, bool (*is_ours)(std::string_view name)) {
  std::error_code error;
  std::filesystem::directory_iterator entry(folder, error);
  for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    std::error_code left;
    if (is_ours(final_name(name)) && std::filesystem::is_regular_file(entry->symlink_status(left))) {
      std::filesystem::remove(entry->path(), left);
    }
    warn_of(left, entry->path());
  }
  warn_of(error, folder);
}

void make_writable_folder(const std::filesystem::path& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) {
    throw UserError(folder.string() + ": cannot be made: " + error.message());
  }
  AtomicFile probe(folder / kProbeFile);  // never committed: leaves nothing
}

}  // namespace m2teacher
