#include "output/file_descriptor.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <utility>

namespace m2teacher {
namespace {

constexpr mode_t kFileMode = 0644;

}  // namespace

void let_writes_fail() {
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);
}

FileDescriptor::FileDescriptor(const std::filesystem::path& path, int flags)
    : value_(::open(path.c_str(), flags | O_CLOEXEC, kFileMode)) {}

FileDescriptor::~FileDescriptor() {
  if (is_open()) {
    ::close(value_);
  }
}

FileDescriptor::FileDescriptor(FileDescriptor&& other) noexcept : value_(std::exchange(other.value_, -1)) {}

FileDescriptor& FileDescriptor::operator=(FileDescriptor&& other) noexcept {
  std::swap(value_, other.value_);
  return *this;
}

bool FileDescriptor::write(const void* data, size_t size) const {
  const char* from = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t written = ::write(value_, from, size);
    if (written < 0 && errno != EINTR) {
      return false;
    }
    if (written > 0) {
      from += written;
      size -= static_cast<size_t>(written);
    }
  }
  return true;
}

bool FileDescriptor::flush() const { return ::fsync(value_) == 0; }

bool FileDescriptor::close() { return ::close(std::exchange(value_, -1)) == 0; }

}  // namespace m2teacher
