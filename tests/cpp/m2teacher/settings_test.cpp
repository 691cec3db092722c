#include "settings/run_settings.h"

#include "expect_little_memory.h"
#include "expect_regular_file.h"
#include "expect_user_error.h"
#include "temporary_folder.h"

#include <algorithm>
#include <map>
#include <set>

namespace m2teacher {
namespace {

/// Settings of which no number and no word is its default.
RunSettings unusual() {
  RunSettings settings;
  settings.threads = 3;
  settings.data.spec = {.kind = DataSpec::Kind::Cifar10, .folder = "/some where/with, = and [brackets]"};
  settings.data.image_size = 96;
  settings.data.centre_crop = 1.0 / 3;
  settings.data.strict = true;
  settings.data.max_pixels = 22;
  settings.data.loader = {.threads = 5, .batches_ahead = 6, .timeout_seconds = 7.25};
  BranchOptions& model = settings.recipe.model;
  model.encoder.architecture = Architecture::Small;
  model.encoder.stem = Stem::Small;
  model.encoder.widths = {7};
  model.encoder.pool = 3;
  model.projector_hidden = 11;
  model.predictor_hidden = 12;
  model.projector_out = 13;
  settings.recipe.augment = {.min_area = 0.1,
                             .max_area = 0.9,
                             .max_aspect = 1.5,
                             .flip = 0.25,
                             .jitter = 0.7,
                             .brightness = 0.3,
                             .contrast = 0.35,
                             .saturation = 0.15,
                             .hue = 0.05,
                             .gamma = 0.6,
                             .greyscale = 0.1,
                             .min_blur_sigma = 0.5,
                             .max_blur_sigma = 1.5,
                             .views = {{{.blur = 0.5, .solarise = 0.6}, {.blur = 0.7, .solarise = 0.8}}}};
  settings.recipe.bn = TeacherNorm::Batch;
  settings.recipe.student_bn = StudentNorm::Torch;
  settings.recipe.synchronise_statistics = true;
  settings.recipe.precision = Precision::BFloat16;
  settings.recipe.batch_size = 17;
  settings.recipe.accumulate = 22;
  settings.recipe.epochs = 1e-5;
  settings.recipe.steps = 18;
  settings.recipe.warmup_epochs = 0.1;
  settings.recipe.warmup_steps = 0;
  settings.recipe.base_learning_rate = 0.07;
  settings.recipe.learning_rate = 2.0 / 3;
  settings.recipe.optimiser = Optimiser::Lars;
  settings.recipe.lars_trust_coefficient = 0.002;
  settings.recipe.sgd_momentum = 0.8;
  settings.recipe.weight_decay = 1e-6;
  settings.recipe.param_momentum = 0.999;
  settings.recipe.seed = 4294967295;
  settings.eval_every = 0;
  settings.checkpoint_every = 19;
  settings.keep = 20;
  settings.process_timeout = 21.5;
  return settings;
}

TEST(RunSettings, ComeBackFromTomlAsTheyWere) {
  const std::string text = to_toml(unusual());
  EXPECT_EQ(to_toml(parse_toml(text, "file")), text);
  EXPECT_PRED2(contains, text, "\nwidths = 7\n");
  EXPECT_PRED2(contains, text, "\nblur = [0.5, 0.7]\n");
  EXPECT_PRED2(contains, text, "\ncentre-crop = 0.3333333333333333\n");
  EXPECT_PRED2(contains, text, "\ndata = \"cifar10:/some where/with, = and [brackets]\"\n");
  // No field was forgotten: none has its default value.
  std::map<std::string, std::string> defaults;
  for (const NamedValue& setting : fixed_settings(RunSettings())) {
    defaults[setting.name] = setting.value;
  }
  for (const NamedValue& setting : fixed_settings(parse_toml(text, "file"))) {
    EXPECT_NE(setting.value, defaults.at(setting.name)) << setting.name;
  }
  const RunSettings back = parse_toml(text, "file");
  EXPECT_EQ(back.threads, 3);
  EXPECT_EQ(back.recipe.learning_rate, 2.0 / 3);
  EXPECT_EQ(back.recipe.augment.views[1].solarise, 0.8);
  EXPECT_EQ(back.data.spec.folder, unusual().data.spec.folder);
  EXPECT_TRUE(back.data.strict);
}

TEST(RunSettings, OpenOnesStayOpen) {
  const RunSettings back = parse_toml(to_toml(RunSettings()), "file");
  EXPECT_EQ(to_toml(back), to_toml(RunSettings()));
  EXPECT_FALSE(back.threads.has_value());
  EXPECT_FALSE(back.recipe.steps.has_value());
  EXPECT_FALSE(back.recipe.learning_rate.has_value());
  EXPECT_FALSE(back.recipe.model.encoder.stem.has_value());
}

TEST(RunSettings, TakeListsOverSeveralLines) {
  const RunSettings settings =
      parse_toml("[pretrain]\n# widths = [1\n; widths = [2\nwidths = [4, # first\n  8,\n\n  12]\nsteps = 9\n", "file");
  EXPECT_EQ(settings.recipe.model.encoder.widths, (std::vector<int64_t>{4, 8, 12}));
  EXPECT_EQ(settings.recipe.steps, 9);
}

TEST(RunSettings, RefuseWhatTomlCannotHold) {
  RunSettings settings;
  settings.data.spec.folder = "/images #1";
  expect_user_error([&] { to_toml(settings); }, "--data: 'idx:/images #1' cannot be kept in config.toml");
  settings.data.spec.folder = "/images\nkeep = [1";
  expect_user_error([&] { to_toml(settings); }, "cannot be kept in config.toml");
}

TEST(RunSettings, ErrorsNameTheFileAndTheSetting) {
  const auto refuse = [](const std::string& text, const std::string& part) {
    expect_user_error([&] { parse_toml(text, "a.toml"); }, part);
    expect_user_error([&] { parse_toml(text, "a.toml"); }, "a.toml: ");
  };
  refuse("[pretrain]\nsteps = 0\n", "--steps: got 0, expected 1 or more");
  refuse("[pretrain]\nsteps = [1, 2]\n", "--steps");
  refuse("[pretrain]\nstep = 1\n", "pretrain.step");
  refuse("[pretrain]\nsteps 1\n", "steps 1");
  refuse("steps = 1\n", "steps");
  refuse("[knn]\nseed = 1\n", "knn");
  refuse("[pretrain]\nsteps = 1\nkeep = 2\nsteps = 3\n", "'pretrain.steps' is set twice");
  refuse("[pretrain]\nkeep = 2\nwidths = [4]\nwidths = [8]\n", "line 4: 'pretrain.widths' is set twice");
  refuse("[pretrain]\nstrict = true\nstrict = true\n", "line 3: 'pretrain.strict' is set twice");
  refuse("[pretrain]\nstrict\nstrict\n", "line 3: 'pretrain.strict' is set twice");
  refuse("threads = 1\n[default]\nthreads = 1\n", "line 3: 'threads' is set twice");
  refuse("[pretrain]\nsteps = [50", "line 2: the list of 'steps' has no closing ]");
  refuse("[pretrain]\n\nwidths = [4, 8, 12 # and so on\n\n", "line 3: the list of 'widths' has no closing ]");
  refuse("[pretrain]\nbn = \"layer\"\n", "--bn: got 'layer', expected one of momentum, batch");
  refuse("[pretrain]\ndata = \"idx\"\n", "--data: got 'idx', expected");
  refuse("[pretrain]\nstrict = \"perhaps\"\n", "strict");
  refuse("[pretrain]\nblur = 0.5\n", "--blur");
  refuse("threads = 0\n", "--threads: got 0, expected 1 to 1024");
  expect_user_error([] { read_config("/nowhere/a.toml"); }, "/nowhere/a.toml: cannot be read");
}

TEST(RunSettings, AreReadFromRegularFilesOfSomeLength) {
  const TemporaryFolder folder;
  const auto path = folder / "config.toml";
  expect_regular_file(path, [&] { read_config(path); });
  write_bytes(path, "");
  expect_user_error([&] { read_config(path); }, "config.toml: is empty");
  write_bytes(path, "[pretrain]\n");
  expect_little_memory(
      path, [&] { expect_user_error([&] { read_config(path); }, "config.toml: longer than 262144 characters"); });
}

TEST(FixedSettings, AreWhatResultsDependOn) {
  std::set<std::string> names;
  for (const NamedValue& setting : fixed_settings(RunSettings())) {
    EXPECT_TRUE(names.insert(setting.name).second) << setting.name;
  }
  for (const char* name : {"seed", "batch-size", "steps", "bn", "widths", "solarise", "image-size"}) {
    EXPECT_TRUE(names.contains(name)) << name;
  }
  for (const char* name : {"threads", "data", "loader-threads", "keep", "checkpoint-every", "eval-every", "strict"}) {
    EXPECT_FALSE(names.contains(name)) << name;
  }
}

}  // namespace
}  // namespace m2teacher
