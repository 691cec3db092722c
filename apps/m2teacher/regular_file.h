#pragma once

#include "error.h"

#include <filesystem>
#include <system_error>

namespace m2teacher {

/// Whether something stands at the path that is no regular file: a folder, a pipe, which would keep whoever opens it
/// waiting, or a device, which may have no end.
inline bool is_irregular(const std::filesystem::path& path) {
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::status(path, error);
  return std::filesystem::exists(status) && !std::filesystem::is_regular_file(status);
}

/// A file that is missing is left to whoever opens it. @throws UserError
inline void refuse_irregular(const std::filesystem::path& path) {
  if (is_irregular(path)) {
    throw UserError(path.string() + (std::filesystem::is_directory(path) ? ": is a folder, expected a regular file"
                                                                         : ": is no regular file"));
  }
}

}  // namespace m2teacher
