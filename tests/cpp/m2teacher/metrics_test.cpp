#include "output/metrics.h"

#include "expect_little_memory.h"
#include "expect_regular_file.h"
#include "expect_user_error.h"
#include "temporary_folder.h"

#include <string>

namespace m2teacher {
namespace {

constexpr const char* kHead =
    "step,images,loss,learning_rate,param_momentum,bn_momentum,teacher_knn,seconds,images_per_second\n";

StepReport report(int64_t step, double loss) {
  return {.step = step,
          .learning_rate = 0.1,
          .param_momentum = 0.97,
          .bn_momentum = 0.5,
          .outcome = at::tensor({loss, 0.0}, at::kDouble)};
}

TEST(MetricsFile, AveragesTheLossBetweenRows) {
  const TemporaryFolder folder;
  MetricsFile metrics(folder / "metrics.csv");
  metrics.add(report(1, 4), 32, 0.5);
  metrics.add(report(2, 2), 32, 1.5);
  metrics.write_row(64, std::nullopt);
  metrics.add(report(3, 1.0 / 3), 32, 0.25);
  EXPECT_EQ(metrics.state().rows, 1);
  EXPECT_EQ(metrics.state().loss_count, 1);
  EXPECT_EQ(metrics.state().loss_sum, 1.0 / 3);
  metrics.write_row(96, 81.5);
  // Losses are written so that nothing is lost of them; times take the last two columns.
  EXPECT_EQ(read_bytes(folder / "metrics.csv"), std::string(kHead) +
                                                    "2,64,3,0.1,0.97,0.5,,2.0,32.0\n"
                                                    "3,96,0.3333333333333333,0.1,0.97,0.5,81.5,2.2,128.0\n");
  expect_user_error([&] { MetricsFile(folder / "nowhere" / "metrics.csv"); }, "cannot be written");
}

TEST(MetricsFile, GoesOnWhereItsStateSays) {
  const TemporaryFolder folder;
  const auto path = folder / "metrics.csv";
  MetricsState state;
  {
    MetricsFile metrics(path);
    metrics.add(report(1, 4), 32, 10);
    metrics.write_row(32, std::nullopt);
    metrics.add(report(2, 3), 32, 1);
    state = metrics.state();
    metrics.add(report(3, 9), 32, 1);
    metrics.write_row(96, std::nullopt);
  }
  write_bytes(path, read_bytes(path) + "4,128,0.");  // killed within a row
  {
    MetricsFile metrics(path, state);
    metrics.add(report(3, 1), 32, 0.5);
    metrics.write_row(96, std::nullopt);
    EXPECT_EQ(metrics.state().rows, 2);
  }
  // The loss of step 2 comes from the state, the seconds before from the file.
  EXPECT_EQ(read_bytes(path), std::string(kHead) + "1,32,4,0.1,0.97,0.5,,10.0,3.2\n3,96,2,0.1,0.97,0.5,,10.5,64.0\n");

  write_bytes(path, std::string(kHead) + "1,32,4,0.1,0.97,0.5,,10.0,3.2");  // its last line is incomplete
  expect_user_error([&] { MetricsFile(path, state); }, "has lost rows: holds 0, the checkpoint was saved after 1");
  for (const char* other : {"", "step,loss\n1,2\n"}) {
    write_bytes(path, other);
    expect_user_error([&] { MetricsFile(path, state); }, "not the metrics of a run");
    EXPECT_EQ(read_bytes(path), other);
  }
}

TEST(MetricsFile, IsARegularFileOfShortLines) {
  const TemporaryFolder folder;
  const auto path = folder / "metrics.csv";
  expect_regular_file(path, [&] { const MetricsFile begun(path); });
  expect_regular_file(path, [&] { MetricsFile(path, MetricsState()); });
  write_bytes(path, kHead);
  expect_little_memory(path,
                       [&] { expect_user_error([&] { MetricsFile(path, {.rows = 1}); }, "has lost rows: holds 0"); });
}

}  // namespace
}  // namespace m2teacher
