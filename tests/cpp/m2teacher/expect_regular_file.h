#pragma once

#include "expect_user_error.h"

#include <sys/stat.h>

#include <filesystem>

namespace m2teacher {

/// The call, which reads or writes the file, must refuse what stands there in place of one: a folder, a device without
/// end, and a pipe that nobody else opens.
template <typename Call>
void expect_regular_file(const std::filesystem::path& path, const Call& call) {
  const std::string error = path.string() + ": is no regular file";
  std::filesystem::remove(path);
  std::filesystem::create_directory(path);
  expect_user_error(call, path.string() + ": is a folder, expected a regular file");
  std::filesystem::remove(path);
  std::filesystem::create_symlink("/dev/zero", path);
  expect_user_error(call, error);
  std::filesystem::remove(path);
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  expect_user_error(call, error);
  std::filesystem::remove(path);
}

}  // namespace m2teacher
