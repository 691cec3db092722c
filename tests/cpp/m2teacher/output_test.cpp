#include "output/metrics.h"

#include "expect_user_error.h"
#include "output/atomic_file.h"
#include "output/progress.h"
#include "output/table.h"
#include "temporary_folder.h"

#include <sstream>

namespace m2teacher {
namespace {

TEST(Progress, WritesPlainLinesWhereThereIsNoTerminal) {
  std::ostringstream stream;
  Progress progress(stream, /*terminal=*/false, 3, 32);
  for (int64_t step = 1; step <= 3; ++step) {
    progress.update(step, 2.5);
  }
  EXPECT_TRUE(stream.str().starts_with("step 1/3  loss 2.500  ")) << stream.str();
  EXPECT_TRUE(stream.str().ends_with("images/s  0:00 left\n")) << stream.str();
  EXPECT_PRED2(contains, stream.str(), "step 3/3");
  EXPECT_FALSE(contains(stream.str(), "\r")) << stream.str();
  EXPECT_GT(progress.images_per_second(), 0);
}

TEST(Progress, RedrawsABarOnATerminal) {
  std::ostringstream stream;
  Progress progress(stream, /*terminal=*/true, 2, 32);
  progress.update(1, 1);
  progress.update(2, 1);
  EXPECT_TRUE(stream.str().starts_with("\r[###############...............] step 1/2")) << stream.str();
  EXPECT_PRED2(contains, stream.str(), "\r[##############################] step 2/2");
  EXPECT_TRUE(stream.str().ends_with("\033[K\n")) << stream.str();
}

TEST(Progress, FormatsDurations) {
  EXPECT_EQ(format_duration(0), "0:00");
  EXPECT_EQ(format_duration(65.4), "1:05");
  EXPECT_EQ(format_duration(3599.6), "1:00:00");
  EXPECT_EQ(format_duration(7209), "2:00:09");
}

TEST(MetricsFile, AveragesTheLossBetweenRows) {
  const TemporaryFolder folder;
  MetricsFile metrics(folder / "metrics.csv");
  metrics.add({.step = 1, .loss = 4, .learning_rate = 0.1, .param_momentum = 0.97, .bn_momentum = 1});
  metrics.add({.step = 2, .loss = 2, .learning_rate = 0.2, .param_momentum = 0.98, .bn_momentum = 0.5});
  metrics.write_row(64, 100, std::nullopt);
  metrics.add({.step = 3, .loss = 1, .learning_rate = 0.3, .param_momentum = 0.99, .bn_momentum = 0.25});
  metrics.write_row(96, 100, 81.5);
  EXPECT_EQ(read_bytes(folder / "metrics.csv"),
            "step,images,loss,learning_rate,param_momentum,bn_momentum,images_per_second,teacher_knn\n"
            "2,64,3,0.2,0.98,0.5,100,\n"
            "3,96,1,0.3,0.99,0.25,100,81.5\n");
  expect_user_error([&] { MetricsFile(folder / "nowhere" / "metrics.csv"); }, "cannot be written");
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
