#include "training/options.h"

#include "data/data_options.h"
#include "expect_user_error.h"

namespace m2teacher {
namespace {

TEST(DataSpec, IsKindAndFolder) {
  const DataSpec spec = parse_data_spec("cifar10:/some/where:else");
  EXPECT_EQ(spec.kind, DataSpec::Kind::Cifar10);
  EXPECT_EQ(spec.folder, "/some/where:else");
  EXPECT_EQ(to_string(spec), "cifar10:/some/where:else");
  EXPECT_EQ(to_string(DataSpec{}), "idx:/usr/share/datasets/fashion-mnist");
  expect_user_error([] { parse_data_spec("/some/where"); }, "--data: got '/some/where', expected idx:FOLDER");
  expect_user_error([] { parse_data_spec("folder:"); }, "--data: got 'folder:', expected");
  expect_user_error([] { parse_data_spec("zip:x"); }, "--data: got 'zip', expected one of idx, cifar10, folder");
}

TEST(Options, WordsAndBack) {
  for (const char* word : {"small", "resnet18", "resnet50"}) {
    EXPECT_EQ(to_string(parse_architecture(word)), word);
  }
  EXPECT_EQ(to_string(parse_stem("small")), "small");
  EXPECT_EQ(to_string(parse_teacher_norm("batch")), "batch");
  EXPECT_EQ(to_string(parse_student_norm("torch")), "torch");
  EXPECT_EQ(to_string(parse_precision("bf16")), "bf16");
  EXPECT_EQ(to_string(parse_optimiser("lars")), "lars");
  expect_user_error([] { parse_precision("fp16"); }, "--precision: got 'fp16', expected one of fp32, bf16");
}

constexpr ImageShape kMnist = {.channels = 1, .height = 28, .width = 28};
constexpr ImageShape kImageNet = {.channels = 3, .height = 224, .width = 224};

TEST(Resolve, IsThePapersRecipeScaledToTheBatch) {
  PretrainOptions options;
  options.batch_size = 512;
  const PretrainOptions resolved = resolve(options, 1'281'167, kImageNet);
  EXPECT_EQ(resolved.steps, 100 * 2502);  // whole batches of 512
  EXPECT_EQ(resolved.warmup_steps, 10 * 2502);
  EXPECT_DOUBLE_EQ(*resolved.learning_rate, 0.1);
  EXPECT_EQ(resolved.model.encoder.stem, Stem::Standard);
  EXPECT_EQ(resolved.model.encoder.in_channels, 3);
}

TEST(Resolve, CountsTheImagesOfAllBatchesOfAStep) {
  PretrainOptions options;
  options.batch_size = 512;
  options.accumulate = 8;
  const PretrainOptions resolved = resolve(options, 1'281'167, kImageNet);
  EXPECT_EQ(resolved.images_per_step(), 4096);
  EXPECT_EQ(resolved.steps, 31275);  // 100 * 2502 batches / 8
  EXPECT_EQ(resolved.warmup_steps, 3127);
  EXPECT_DOUBLE_EQ(*resolved.learning_rate, 0.8);
  options.base_learning_rate = 100;
  expect_user_error(
      [&] { resolve(options, 1'281'167, kImageNet); },
      "--base-learning-rate: got 100 for 256 images, which is 1600 for the 4096 of a step, expected at most "
      "1000 for these");
  options.base_learning_rate = 0.05;
  options.steps = std::numeric_limits<int64_t>::max() / 4;
  expect_user_error([&] { resolve(options, 1'281'167, kImageNet); }, "with --accumulate 8");
  options.steps = std::nullopt;
  options.accumulate = 0;
  expect_user_error([&] { resolve(options, 1000, kImageNet); }, "--accumulate: got 0, expected 1 or more");
}

TEST(Resolve, KeepsWhatIsSetAndStaysWhereItIs) {
  PretrainOptions options;
  options.batch_size = 10;
  options.steps = 7;
  options.warmup_steps = 7;
  options.learning_rate = 0.3;
  options.model.encoder.stem = Stem::Standard;
  PretrainOptions resolved = resolve(options, 100, kMnist);
  for (int again = 0; again < 2; ++again) {
    EXPECT_EQ(resolved.steps, 7);
    EXPECT_EQ(resolved.warmup_steps, 7);
    EXPECT_EQ(resolved.learning_rate, 0.3);
    EXPECT_EQ(resolved.model.encoder.stem, Stem::Standard);
    EXPECT_EQ(resolved.model.encoder.in_channels, 1);
    resolved = resolve(resolved, 100, kMnist);
  }
}

TEST(Resolve, ShortRunsWarmUpForATenthAndSmallImagesHaveTheSmallStem) {
  PretrainOptions options;
  options.batch_size = 10;
  options.epochs = 5;
  const PretrainOptions resolved = resolve(options, 105, kMnist);
  EXPECT_EQ(resolved.steps, 50);
  EXPECT_EQ(resolved.warmup_steps, 5);
  EXPECT_EQ(resolved.model.encoder.stem, Stem::Small);
}

TEST(Resolve, LarsAloneHasATrustCoefficient) {
  PretrainOptions options;
  options.batch_size = 10;
  EXPECT_EQ(resolve(options, 100, kMnist).lars_trust_coefficient, std::nullopt);
  options.optimiser = Optimiser::Lars;
  const PretrainOptions resolved = resolve(options, 100, kMnist);
  EXPECT_EQ(resolved.lars_trust_coefficient, 1e-3);
  EXPECT_EQ(resolve(resolved, 100, kMnist).lars_trust_coefficient, 1e-3);
}

TEST(Resolve, RefusesWhatDoesNotFit) {
  const auto refuse = [](const std::string& part, const auto& change) {
    PretrainOptions options;
    options.batch_size = 10;
    change(options);
    expect_user_error([&] { resolve(options, 100, kMnist); }, part);
  };
  using O = PretrainOptions;
  refuse("--batch-size: 101 is more than the 100 training images", [](O& o) { o.batch_size = 101; });
  refuse("--batch-size: got 1, expected 2 or more", [](O& o) { o.batch_size = 1; });
  refuse("--steps: got 0, expected 1 or more", [](O& o) { o.steps = 0; });
  refuse("--epochs: got 0, expected more than 0", [](O& o) { o.epochs = 0; });
  refuse("--warmup-steps: got 6, expected at most the 5 steps", [](O& o) {
    o.steps = 5;
    o.warmup_steps = 6;
  });
  refuse("--min-area: got 0.5, expected at most --max-area (0.4)", [](O& o) {
    o.augment.min_area = 0.5;
    o.augment.max_area = 0.4;
  });
  refuse("--min-blur-sigma: got 3, expected at most --max-blur-sigma (2)", [](O& o) { o.augment.min_blur_sigma = 3; });
  refuse("--lars-trust-coefficient: got --optimizer sgd, expected --optimizer lars",
         [](O& o) { o.lars_trust_coefficient = 0.001; });
  refuse("--widths: got none", [](O& o) { o.model.encoder.widths = {}; });
}

}  // namespace
}  // namespace m2teacher
