#include "output/metrics.h"

#include "expect_user_error.h"
#include "temporary_folder.h"

#include <string>

namespace m2teacher {
namespace {

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

}  // namespace
}  // namespace m2teacher
