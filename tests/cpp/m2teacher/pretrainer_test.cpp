#include "training/pretrainer.h"

#include "benchmark/published_norm.h"
#include "expect_user_error.h"
#include "synthetic_images.h"

#include <cmath>
#include <numbers>
#include <set>

namespace m2teacher {
namespace {

PretrainOptions small_recipe(int64_t steps) {
  PretrainOptions options;
  options.model.encoder.widths = {8, 16};
  options.model.head_hidden = 32;
  options.model.head_out = 16;
  options.steps = steps;
  options.batch_size = 16;
  options.warmup_steps = 5;
  return options;
}

std::vector<double> losses(const PretrainOptions& options, const NormFactory& norm = momentum_batch_norm()) {
  Pretrainer pretrainer(options, bar_images(200), norm);
  std::vector<double> out;
  for (int64_t step = 0; step < options.steps; ++step) {
    out.push_back(pretrainer.step().loss);
  }
  return out;
}

TEST(Pretrainer, ReducesTheLoss) {
  const std::vector<double> run = losses(small_recipe(100));
  double last = 0;
  for (size_t i = 0; i < 10; ++i) {
    last += run[run.size() - 1 - i] / 10;
  }
  EXPECT_GT(run.front(), 3);  // nearly unrelated directions: 4
  EXPECT_LT(last, 0.6 * run.front());
}

TEST(Pretrainer, SameSeedSameBits) {
  EXPECT_EQ(losses(small_recipe(5)), losses(small_recipe(5)));
  PretrainOptions other = small_recipe(5);
  other.seed = 1;
  EXPECT_NE(losses(small_recipe(5)), losses(other));
}

TEST(Pretrainer, PublishedFormulasGiveTheSameTraining) {
  // The published layer's schedule is longer, which the first update does not yet show.
  const std::vector<double> ours = losses(small_recipe(2));
  const std::vector<double> published = losses(small_recipe(2), published_norm());
  EXPECT_NEAR(ours[0], published[0], 1e-4);
}

TEST(Pretrainer, ReportsTheSchedules) {
  const PretrainOptions options = small_recipe(10);
  Pretrainer pretrainer(options, bar_images(100));
  for (int64_t step = 0; step < options.steps; ++step) {
    const double cosine = (std::cos(std::numbers::pi * static_cast<double>(step) / 10) + 1) / 2;
    const StepReport report = pretrainer.step();
    EXPECT_EQ(report.step, step + 1);
    EXPECT_NEAR(report.bn_momentum, cosine, 1e-9);
    EXPECT_NEAR(report.param_momentum, 1 - (1 - options.param_momentum) * cosine, 1e-9);
    EXPECT_GE(report.loss, 0);
    EXPECT_LE(report.loss, 8);
  }
}

TEST(Pretrainer, TeacherIsTheAverageOfTheStudent) {
  PretrainOptions options = small_recipe(3);
  options.param_momentum = 0.5;
  Pretrainer pretrainer(options, bar_images(100));
  const auto weight = [](const torch::nn::Module& module) {
    return module.named_parameters()["encoder.conv1.weight"].detach().clone();
  };
  pretrainer.step();
  const at::Tensor student = weight(*pretrainer.student());
  const at::Tensor teacher = weight(*pretrainer.teacher().model());
  const double momentum = pretrainer.step().param_momentum;
  const at::Tensor expected = momentum * teacher + (1 - momentum) * student;
  EXPECT_TRUE(at::allclose(weight(*pretrainer.teacher().model()), expected, 1e-5, 1e-7));
  for (const at::Tensor& parameter : pretrainer.teacher().model()->parameters()) {
    EXPECT_FALSE(parameter.requires_grad());
  }
}

TEST(BatchSampler, VisitsEveryImageOncePerEpoch) {
  BatchSampler sampler(10, 3, 1);
  for (int epoch = 0; epoch < 3; ++epoch) {
    std::set<int64_t> seen;
    for (int batch = 0; batch < 3; ++batch) {
      const at::Tensor index = sampler.next();
      for (int64_t i = 0; i < 3; ++i) {
        seen.insert(index[i].item<int64_t>());
      }
    }
    EXPECT_EQ(seen.size(), 9);
  }
  expect_user_error([] { BatchSampler(4, 5, 1); }, "--batch-size: 5 is more than the 4 training images");
}

}  // namespace
}  // namespace m2teacher
