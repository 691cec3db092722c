#pragma once

#include <gtest/gtest.h>

#include <sys/resource.h>

#include <filesystem>

namespace m2teacher {

/// The most memory that this process has had so far, in KiB.
inline int64_t peak_memory() {
  struct rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss;
}

/// The call must not read the file into memory, which is made a gigabyte long for it, without taking room on the disk.
template <typename Call>
void expect_little_memory(const std::filesystem::path& path, const Call& call) {
  std::filesystem::resize_file(path, uint64_t{1} << 30);
  const int64_t before = peak_memory();
  call();
  EXPECT_LT(peak_memory() - before, 1 << 16);
}

}  // namespace m2teacher
