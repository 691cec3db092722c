#include "training/pretrainer.h"

#include "benchmark/published_norm.h"
#include "expect_user_error.h"
#include "synthetic_images.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <numbers>
#include <set>

namespace m2teacher {
namespace {

PretrainOptions small_recipe(int64_t steps) {
  PretrainOptions options;
  options.model.encoder.architecture = Architecture::Small;
  options.model.encoder.widths = {8, 16};
  options.model.projector_hidden = 32;
  options.model.predictor_hidden = 32;
  options.model.projector_out = 16;
  options.steps = steps;
  options.batch_size = 16;
  options.warmup_steps = std::min<int64_t>(5, steps);
  options.learning_rate = 0.1;
  options.param_momentum = 0.97;
  options.augment.min_area = 0.5;
  options.augment.views = {};
  return options;
}

/// Noisy images of a bar, from memory.
TrainingData bar_data(int64_t count) {
  const at::Tensor images = bar_images(count);
  return {.source = std::make_shared<TensorSource>(images, at::Tensor()), .pixels = pixel_statistics(images)};
}

std::vector<double> losses(const PretrainOptions& options, const NormFactory& norm = nullptr) {
  Pretrainer pretrainer(options, bar_data(200), norm);
  std::vector<double> out;
  for (int64_t step = 0; step < *options.steps; ++step) {
    out.push_back(pretrainer.step().loss());
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

TEST(Pretrainer, GoesOnFromARunWithTheOtherStudentsLayer) {
  PretrainOptions with_torchs = small_recipe(4);
  with_torchs.student_bn = StudentNorm::Torch;
  ASSERT_EQ(small_recipe(4).student_bn, StudentNorm::Fused);
  Pretrainer torchs(with_torchs, bar_data(100));
  Pretrainer fused(small_recipe(4), bar_data(100));
  torchs.step();
  std::map<std::string, at::Tensor> saved;
  for (const auto& [name, tensor] : torchs.state()) {
    saved.emplace(name, tensor.clone());
  }
  fused.load_state(saved);
  for (int step = 1; step < 4; ++step) {
    EXPECT_NEAR(fused.step().loss(), torchs.step().loss(), 1e-3);
  }
}

TEST(Pretrainer, ReportsTheSchedules) {
  PretrainOptions options = small_recipe(10);
  options.accumulate = 3;  // all batches of a step belong to one update
  Pretrainer pretrainer(options, bar_data(100));
  for (int64_t step = 0; step < *options.steps; ++step) {
    const double cosine = (std::cos(std::numbers::pi * static_cast<double>(step) / 10) + 1) / 2;
    const StepReport report = pretrainer.step();
    EXPECT_EQ(report.step, step + 1);
    EXPECT_NEAR(report.bn_momentum, cosine, 1e-9);
    EXPECT_NEAR(report.param_momentum, 1 - (1 - options.param_momentum) * cosine, 1e-9);
    EXPECT_GE(report.loss(), 0);
    EXPECT_LE(report.loss(), 8);
  }
}

/// Images as they are: whole and in their colours.
AugmentOptions no_augmentation() {
  AugmentOptions none;
  none.min_area = none.max_area = none.max_aspect = 1;
  none.flip = none.jitter = none.gamma = none.greyscale = 0;
  none.views = {};
  return none;
}

/// The batches of another from a number on.
class LaterBatches : public TrainingBatches {
 public:
  LaterBatches(std::unique_ptr<TrainingBatches> batches, int64_t first) : batches_(std::move(batches)), first_(first) {}
  TrainingBatch batch(int64_t number) override { return batches_->batch(first_ + number); }

 private:
  std::unique_ptr<TrainingBatches> batches_;
  int64_t first_;
};

TEST(Pretrainer, AStepOfSeveralBatchesTakesTheMeanOfTheirGradients) {
  PretrainOptions options = small_recipe(10);
  options.augment = no_augmentation();
  options.accumulate = 3;
  const TrainingData data = bar_data(100);
  Pretrainer all(options, data);
  const double loss = all.step().loss();

  // In the first step normalisations take no account of what was before, so each batch may as well be the only one.
  options.accumulate = 1;
  std::map<std::string, at::Tensor> mean;
  double mean_loss = 0;
  for (int64_t number = 0; number < 3; ++number) {
    Pretrainer one(options, data);
    one.set_batches(std::make_unique<LaterBatches>(
        make_training_batches(data, options.augment, options.batch_size, options.seed, 10), number));
    mean_loss += one.step().loss() / 3;
    for (const auto& [name, tensor] : one.state()) {
      at::Tensor& sum = mean[name];
      sum = sum.defined() ? sum + tensor / 3 : tensor / 3;
    }
  }
  EXPECT_NEAR(loss, mean_loss, 1e-6);
  for (const auto& [name, tensor] : all.state()) {
    if (name.starts_with("optimiser.velocity.")) {
      EXPECT_TRUE(at::allclose(tensor, mean.at(name), 1e-4, 1e-7)) << name;
    }
  }
}

TEST(Pretrainer, FourBatchesOfEightAreOneOf32WhereNoNormalisationDependsOnTheBatch) {
  const auto velocities = [](int64_t batch_size, int64_t accumulate) {
    PretrainOptions options = small_recipe(10);
    options.augment = no_augmentation();
    options.batch_size = batch_size;
    options.accumulate = accumulate;
    Pretrainer pretrainer(options, bar_data(100));
    pretrainer.student()->eval();
    pretrainer.teacher()->eval();
    for (int step = 0; step < 3; ++step) {
      pretrainer.step();
    }
    return pretrainer.state();
  };
  const std::map<std::string, at::Tensor> one = velocities(32, 1);
  for (const auto& [name, tensor] : velocities(8, 4)) {
    if (name.starts_with("optimiser.velocity.")) {
      const double scale = one.at(name).abs().max().item<double>();
      EXPECT_LE((tensor - one.at(name)).abs().max().item<double>(), 1e-6 * std::max(1.0, scale)) << name;
    }
  }
}

TEST(Pretrainer, TeacherIsTheAverageOfTheStudent) {
  PretrainOptions options = small_recipe(3);
  options.param_momentum = 0.5;
  Pretrainer pretrainer(options, bar_data(100));
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

void expect_to_go_on_bit_for_bit(const PretrainOptions& options) {
  Pretrainer whole(options, bar_data(100));
  std::map<std::string, at::Tensor> saved;
  std::vector<double> expected;
  for (int step = 0; step < 6; ++step) {
    if (step == 3) {
      for (const auto& [name, tensor] : whole.state()) {
        saved.emplace(name, tensor.clone());
      }
    }
    const double loss = whole.step().loss();
    if (step >= 3) {
      expected.push_back(loss);
    }
  }
  Pretrainer resumed(options, bar_data(100));
  resumed.step();
  resumed.load_state(saved);
  EXPECT_EQ(resumed.steps_done(), 3);
  for (const double loss : expected) {
    EXPECT_EQ(resumed.step().loss(), loss);
  }
  const auto state = whole.state();
  for (const auto& [name, tensor] : resumed.state()) {
    EXPECT_TRUE(at::equal(tensor, state.at(name))) << name;
  }
}

TEST(Pretrainer, GoesOnBitForBitFromItsState) {
  PretrainOptions options = small_recipe(6);
  expect_to_go_on_bit_for_bit(options);
  options.optimiser = Optimiser::Lars;
  expect_to_go_on_bit_for_bit(options);
  options.accumulate = 3;
  expect_to_go_on_bit_for_bit(options);
}

TEST(Pretrainer, LarsTakesOtherSteps) {
  PretrainOptions options = small_recipe(4);
  const std::vector<double> by_sgd = losses(options);
  options.optimiser = Optimiser::Lars;
  EXPECT_NE(losses(options), by_sgd);
}

TEST(Pretrainer, RefusesAStateThatDoesNotFitAndChangesNothing) {
  Pretrainer pretrainer(small_recipe(6), bar_data(100));
  pretrainer.step();
  std::map<std::string, at::Tensor> kept;
  for (const auto& [name, tensor] : pretrainer.state()) {
    kept.emplace(name, tensor.clone());
  }
  const auto refuse = [&](const std::string& part, const auto& change) {
    std::map<std::string, at::Tensor> bad;
    for (const auto& [name, tensor] : kept) {
      bad.emplace(name, at::zeros_like(tensor));
    }
    change(bad);
    expect_user_error([&] { pretrainer.load_state(bad); }, part);
    for (const auto& [name, tensor] : pretrainer.state()) {
      EXPECT_TRUE(at::equal(tensor, kept.at(name))) << name;
    }
  };
  using State = std::map<std::string, at::Tensor>;
  refuse("lacks 'teacher.encoder.bn1.view_count'", [](State& s) { s.erase("teacher.encoder.bn1.view_count"); });
  refuse("has 'student.extra', which", [](State& s) { s.emplace("student.extra", at::zeros({1})); });
  refuse("'optimiser.velocity.encoder.conv1.weight' is Float of shape [2], expected Float of shape [8, 1, 3, 3]",
         [](State& s) { s["optimiser.velocity.encoder.conv1.weight"] = at::zeros({2}); });
  refuse("'step' is Float of shape [], expected Long", [](State& s) { s["step"] = at::zeros({}); });
  refuse("stands at step 7, expected 0 to 6", [](State& s) { s["step"] = at::scalar_tensor(7, at::kLong); });
}

TEST(Pretrainer, BatchNormInTheTeacher) {
  PretrainOptions options = small_recipe(2);
  options.bn = TeacherNorm::Batch;
  Pretrainer pretrainer(options, bar_data(100));
  pretrainer.step();
  EXPECT_FALSE(pretrainer.state().contains("teacher.encoder.bn1.view_count"));
  EXPECT_TRUE(pretrainer.state().contains("teacher.encoder.bn1.running_mean"));
}

TEST(Pretrainer, StatisticsOfAnEmanTeacherFollowTheStudents) {
  PretrainOptions options = small_recipe(3);
  options.bn = TeacherNorm::Eman;
  Pretrainer pretrainer(options, bar_data(100));
  const std::string name = "encoder.bn1.running_var";
  const auto value = [&](const std::string& side) { return pretrainer.state().at(side + name).clone(); };
  pretrainer.step();
  EXPECT_TRUE(at::equal(value("teacher."), at::ones_like(value("teacher."))));  // the student's before the step
  at::Tensor expected = value("teacher.");
  for (int step = 1; step < 3; ++step) {
    const double momentum = pretrainer.teacher()->param_momentum();
    expected = momentum * expected + (1 - momentum) * value("student.");
    pretrainer.step();
    EXPECT_TRUE(at::allclose(value("teacher."), expected, 1e-6)) << step;
    EXPECT_FALSE(at::equal(value("teacher."), value("student.")));
    EXPECT_EQ(pretrainer.state().at("teacher.encoder.bn1.num_batches_tracked").item<int64_t>(), 2 * step);
  }
}

TEST(Pretrainer, TwoThreadsGiveTheSameBitsEveryTime) {
  const int before = at::get_num_threads();
  at::set_num_threads(2);
  for (const int64_t accumulate : {1, 3}) {
    PretrainOptions options = small_recipe(4);
    options.accumulate = accumulate;
    const std::vector<double> expected = losses(options);
    for (int again = 0; again < 20; ++again) {
      EXPECT_EQ(losses(options), expected);
    }
  }
  at::set_num_threads(before);
}

TEST(Pretrainer, BFloat16IsNearFloat32AndKeepsFloat32State) {
  PretrainOptions options = small_recipe(100);
  const std::vector<double> exact = losses(options);
  options.precision = Precision::BFloat16;
  const std::vector<double> rounded = losses(options);
  EXPECT_NEAR(rounded[0], exact[0], 0.05);
  EXPECT_NE(rounded[0], exact[0]);
  EXPECT_NEAR(rounded.back(), exact.back(), 0.3 * exact.back());
  Pretrainer pretrainer(options, bar_data(100));
  pretrainer.step();
  for (const auto& [name, tensor] : pretrainer.state()) {
    EXPECT_NE(tensor.scalar_type(), at::kBFloat16) << name;
  }
}

TEST(BatchSampler, VisitsEveryImageOncePerEpoch) {
  BatchSampler sampler(10, 3, 1);
  for (int epoch = 0; epoch < 3; ++epoch) {
    std::set<int64_t> seen;
    for (int batch = 0; batch < 3; ++batch) {
      const at::Tensor index = sampler.batch(3 * epoch + batch);
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
