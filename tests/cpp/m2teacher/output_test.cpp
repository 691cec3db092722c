#include "output/atomic_file.h"

#include "expect_user_error.h"
#include "output/npy.h"
#include "output/progress.h"
#include "output/table.h"
#include "temporary_folder.h"

#include <ATen/ATen.h>

#include <sys/resource.h>
#include <sys/stat.h>

#include <array>
#include <csignal>
#include <cstring>
#include <sstream>

namespace m2teacher {
namespace {

TEST(Progress, WritesPlainLinesWhereThereIsNoTerminal) {
  std::ostringstream stream;
  Progress progress(stream, /*terminal=*/false, 3, 32);
  for (int64_t step = 1; step <= 3; ++step) {
    progress.update(step, 2.5, 4.0 * static_cast<double>(step));  // of which no time has passed
  }
  EXPECT_TRUE(stream.str().starts_with("step 1/3  loss 2.500  ")) << stream.str();
  EXPECT_TRUE(stream.str().ends_with("images/s  0:00 left\n")) << stream.str();
  EXPECT_PRED2(contains, stream.str(), "step 3/3");
  EXPECT_FALSE(contains(stream.str(), "\r")) << stream.str();
  EXPECT_DOUBLE_EQ(progress.images_per_second(), 8);
  EXPECT_PRED2(contains, stream.str(), "  8 images/s  ");
}

TEST(Progress, RedrawsABarOnATerminal) {
  std::ostringstream stream;
  Progress progress(stream, /*terminal=*/true, 2, 32);
  progress.update(1, 1, 1);
  progress.update(2, 1, 2);
  EXPECT_TRUE(stream.str().starts_with("\r[###############...............] step 1/2")) << stream.str();
  EXPECT_PRED2(contains, stream.str(), "\r[##############################] step 2/2");
  EXPECT_TRUE(stream.str().ends_with("\033[K\n")) << stream.str();
}

TEST(Progress, EndsTheLineOfABarThatIsNotFull) {
  std::ostringstream stream;
  {
    Progress progress(stream, /*terminal=*/true, 2, 32);
    progress.update(1, 1, 1);
    EXPECT_FALSE(stream.str().ends_with('\n')) << stream.str();
  }
  EXPECT_TRUE(stream.str().ends_with("\033[K\n")) << stream.str();
}

TEST(Progress, FormatsDurations) {
  EXPECT_EQ(format_duration(0), "0:00");
  EXPECT_EQ(format_duration(65.4), "1:05");
  EXPECT_EQ(format_duration(3599.6), "1:00:00");
  EXPECT_EQ(format_duration(7209), "2:00:09");
}

TEST(Npy, WritesWhatNumPyWrites) {
  const TemporaryFolder folder;
  write_npy(folder / "a.npy", at::arange(6, at::kFloat).view({3, 2}).t());
  const std::string bytes = read_bytes(folder / "a.npy");
  EXPECT_TRUE(bytes.starts_with(std::string("\x93NUMPY\x01\x00\x76\x00", 10))) << bytes;
  EXPECT_PRED2(contains, bytes, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3, ), }");
  ASSERT_EQ(bytes.size(), 128 + 6 * sizeof(float));
  EXPECT_EQ(bytes[127], '\n');
  std::array<float, 6> values{};
  std::memcpy(values.data(), bytes.data() + 128, sizeof(values));
  EXPECT_EQ(values, (std::array<float, 6>{0, 2, 4, 1, 3, 5}));
  EXPECT_THROW(write_npy(folder / "b.npy", at::zeros({2}, at::kHalf)), std::invalid_argument);
  EXPECT_EQ(folder.file_count(), 1);
}

TEST(AtomicFile, AppearsWholeOrNotAtAll) {
  const TemporaryFolder folder;
  write_bytes(folder / "file", "old");
  {
    AtomicFile file(folder / "file");
    file.write("half", 4);
    EXPECT_EQ(read_bytes(folder / "file"), "old");
  }
  EXPECT_EQ(read_bytes(folder / "file"), "old");
  EXPECT_EQ(folder.file_count(), 1);
  AtomicFile file(folder / "file");
  file.write("new", 3);
  file.commit();
  EXPECT_EQ(read_bytes(folder / "file"), "new");
  EXPECT_EQ(folder.file_count(), 1);
}

TEST(AtomicFile, LeavesTheOldFileWhereTheDiskIsFull) {
  const TemporaryFolder folder;
  write_bytes(folder / "file", "old");
  // A limit on the size of files fails in the same place as a full disk.
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  const rlimit small{.rlim_cur = 1000, .rlim_max = before.rlim_max};
  std::signal(SIGXFSZ, SIG_IGN);
  setrlimit(RLIMIT_FSIZE, &small);
  expect_user_error([&] { write_text_file(folder / "file", std::string(2000, 'x')); }, "file: cannot be written: ");
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, SIG_DFL);
  EXPECT_EQ(read_bytes(folder / "file"), "old");
  EXPECT_EQ(folder.file_count(), 1);
}

TEST(AtomicFile, TakesThePlaceOfFilesAlone) {
  const TemporaryFolder folder;
  std::filesystem::create_directory(folder / "taken");
  ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);  // as devices, which only root can make
  std::filesystem::create_symlink(folder / "pipe", folder / "link");
  for (const char* name : {"taken", "pipe", "link"}) {
    expect_user_error([&] { AtomicFile(folder / name); }, std::string(name) + ": cannot be written: it is there");
  }
  EXPECT_TRUE(std::filesystem::is_fifo(folder / "pipe"));
  EXPECT_EQ(folder.file_count(), 3);
}

TEST(RemoveTemporaryFiles, RemovesWhatAKilledProcessLeft) {
  const TemporaryFolder folder;
  write_bytes(folder / "file.tmp-123", "half");
  write_bytes(folder / "file", "whole");
  const auto is_ours = [](std::string_view name) { return name == "file"; };
  remove_temporary_files(folder / "", is_ours);
  EXPECT_FALSE(std::filesystem::exists(folder / "file.tmp-123"));
  EXPECT_EQ(read_bytes(folder / "file"), "whole");
  remove_temporary_files(folder / "nowhere", is_ours);
}

TEST(MakeWritableFolder, MakesItAndLeavesNothingInIt) {
  const TemporaryFolder folder;
  make_writable_folder(folder / "a" / "b");
  EXPECT_TRUE(std::filesystem::is_empty(folder / "a" / "b"));
  write_bytes(folder / "file", "");
  expect_user_error([&] { make_writable_folder(folder / "file" / "run"); }, "cannot be made");
  expect_user_error([&] { make_writable_folder("/proc/self"); }, "cannot be written");
}

TEST(Table, PadsItsColumns) {
  EXPECT_EQ(format_table({{"name", "kNN"}, {"teacher", "9.5"}}),
            "| name    | kNN |\n"
            "| ------- | --: |\n"
            "| teacher | 9.5 |\n");
  EXPECT_EQ(format_number(84.449, 1), "84.4");
}

}  // namespace
}  // namespace m2teacher
