#include "checkpoint/run_folder.h"

#include "commands/stop_signal.h"
#include "expect_user_error.h"
#include "temporary_folder.h"

#include <sys/stat.h>

#include <csignal>
#include <optional>

namespace m2teacher {
namespace {

std::vector<int64_t> steps_in(const std::filesystem::path& folder) {
  std::vector<int64_t> steps;
  for (const CheckpointFile& file : list_checkpoints(folder)) {
    steps.push_back(file.step);
  }
  return steps;
}

TEST(RunFolder, ListsCheckpointsNewestFirst) {
  const TemporaryFolder folder;
  const RunFolder run(folder / "run");
  EXPECT_EQ(run.checkpoint(70), folder / "run" / "checkpoint-00000070.safetensors");
  EXPECT_EQ(run.checkpoint(123456789), folder / "run" / "checkpoint-123456789.safetensors");
  for (const int64_t step : {70, 123456789, 8}) {
    write_bytes(run.checkpoint(step), "");
  }
  for (const char* other : {"checkpoint-.safetensors", "checkpoint-1x.safetensors", "checkpoint-5.safetensors.tmp-1",
                            "checkpoint--3.safetensors", "acheckpoint-5.safetensors"}) {
    write_bytes(folder / "run" / other, "");
  }
  EXPECT_EQ(steps_in(run.path()), (std::vector<int64_t>{123456789, 70, 8}));
  EXPECT_TRUE(steps_in(folder / "nowhere").empty());
}

TEST(RunFolder, KeepsTheLastAndLeavesNewerOnesAlone) {
  const TemporaryFolder folder;
  const RunFolder run(folder / "run");
  for (const int64_t step : {10, 20, 30, 40, 90}) {
    write_bytes(run.checkpoint(step), "");
  }
  run.keep_last(2, 40);
  EXPECT_EQ(steps_in(run.path()), (std::vector<int64_t>{90, 40, 30}));
}

TEST(RunFolder, ClearsARunAndNothingElse) {
  const TemporaryFolder folder;
  const RunFolder run(folder / "run");
  EXPECT_FALSE(holds_run(run.path()));
  write_bytes(folder / "run" / "notes", "mine");
  EXPECT_FALSE(holds_run(run.path()));
  for (const auto& path : {run.config(), run.metrics(), run.checkpoint(1)}) {
    write_bytes(path, "");
    EXPECT_TRUE(holds_run(run.path()));
    run.clear();
    EXPECT_FALSE(holds_run(run.path()));
  }
  EXPECT_EQ(read_bytes(folder / "run" / "notes"), "mine");
}

TEST(RunFolder, RemovesTemporaryFilesOfItsOwnAndNothingElse) {
  const TemporaryFolder folder;
  const std::vector<std::string> ours = {"config.toml.tmp-71", "checkpoint-00000005.safetensors.tmp-1",
                                         "writable.tmp-4194304"};
  const std::vector<std::string> others = {"notes.tmp-2025.txt",
                                           "notes.tmp-2025",
                                           "config.toml.tmp-",
                                           "config.toml.tmp-7a",
                                           "a.config.toml.tmp-7",
                                           "checkpoint-x.safetensors.tmp-1",
                                           ".tmp-3",
                                           "config.toml.tmp-7.tmp-8"};
  for (const auto& names : {ours, others}) {
    for (const std::string& name : names) {
      write_bytes(folder / name, "mine");
    }
  }
  // Of such names, but no files.
  std::filesystem::create_directory(folder / "config.toml.tmp-8");
  std::filesystem::create_symlink(folder / "notes.tmp-2025", folder / "config.toml.tmp-9");
  const RunFolder run(folder / "");
  for (const std::string& name : ours) {
    EXPECT_FALSE(std::filesystem::exists(folder / name)) << name;
  }
  for (const std::string& name : others) {
    EXPECT_EQ(read_bytes(folder / name), "mine") << name;
  }
  EXPECT_TRUE(std::filesystem::is_directory(folder / "config.toml.tmp-8"));
  EXPECT_TRUE(std::filesystem::is_symlink(folder / "config.toml.tmp-9"));
}

TEST(RunFolder, NoticesThatItIsAnotherFolder) {
  const TemporaryFolder folder;
  const RunFolder run(folder / "run");
  EXPECT_NO_THROW(run.check_still_ours());
  std::filesystem::rename(folder / "run", folder / "moved");
  expect_user_error([&] { run.check_still_ours(); }, "run: is no longer the folder that this run was started in");
  std::filesystem::create_directory(folder / "run");
  EXPECT_FALSE(run.is_still_ours());
}

TEST(RunFolder, ChecksWhatItCannotList) {
  const TemporaryFolder folder;
  write_bytes(folder / "file", "");
  expect_user_error([&] { list_checkpoints(folder / "file"); }, "file: cannot be searched for checkpoints");
  ASSERT_EQ(mkfifo((folder / "checkpoint-00000005.safetensors").c_str(), 0600), 0);  // opening it would never end
  EXPECT_TRUE(list_checkpoints(folder / "").empty());
}

TEST(RunFolder, IsLockedWhileItLives) {
  const TemporaryFolder folder;
  std::optional<RunFolder> run(folder / "run");
  expect_user_error([&] { RunFolder(folder / "run"); }, "another process is training in this folder");
  run.reset();
  EXPECT_NO_THROW(RunFolder(folder / "run"));
}

TEST(StopSignal, RemembersTheFirstAndLetsTheSecondThrough) {
  struct sigaction before = {};
  sigaction(SIGTERM, nullptr, &before);
  {
    const StopSignal stop;
    EXPECT_FALSE(stop.received());
    std::raise(SIGTERM);
    EXPECT_TRUE(stop.received());
    struct sigaction now = {};
    for (const int signal : {SIGTERM, SIGINT, SIGHUP}) {
      sigaction(signal, nullptr, &now);
      EXPECT_EQ(now.sa_handler, before.sa_handler);
    }
  }
  const StopSignal again;
  EXPECT_FALSE(again.received());
}

TEST(StopSignal, LeavesAnIgnoredSignalIgnored) {
  std::signal(SIGINT, SIG_IGN);
  {
    const StopSignal stop;
    std::raise(SIGINT);
    EXPECT_FALSE(stop.received());
  }
  EXPECT_EQ(std::signal(SIGINT, SIG_DFL), SIG_IGN);
}

}  // namespace
}  // namespace m2teacher
