#include "checkpoint/checkpoint.h"

#include "checkpoint/run_folder.h"
#include "checkpoint/safetensors.h"
#include "eval/features.h"
#include "expect_user_error.h"
#include "synthetic_images.h"
#include "temporary_folder.h"

#include <ATen/ops/scalar_tensor.h>

#include <fstream>
#include <limits>
#include <memory>
#include <regex>
#include <sstream>

namespace m2teacher {
namespace {

class CheckpointTest : public testing::Test {
 protected:
  static RunSettings small_settings() {
    RunSettings settings;
    settings.threads = 1;
    BranchOptions& model = settings.recipe.model;
    model.encoder.architecture = Architecture::Small;
    model.encoder.widths = {3, 2};
    model.encoder.pool = 1;
    model.projector_hidden = 2;
    model.predictor_hidden = 2;
    model.projector_out = 2;
    settings.recipe.batch_size = 4;
    settings.recipe.steps = 5;
    settings.recipe.warmup_steps = 1;
    return settings;
  }
  CheckpointTest() {
    settings_.recipe = pretrainer_.options();
    for (int step = 0; step < 3; ++step) {
      pretrainer_.step();
    }
    save_checkpoint(path_, {.path = {},
                            .settings = settings_,
                            .trained_on = trained_on_,
                            .metrics = {.rows = 1, .loss_count = 2, .loss_sum = 1.0 / 3},
                            .state = pretrainer_.state()});
  }
  /// Reads what `change` makes of the saved contents.
  template <typename Change>
  void refuse_changed(const Change& change, const std::string& part) const {
    Safetensors contents = read_checked_safetensors(path_);
    change(contents);
    write_checked_safetensors(folder_ / "changed", contents);
    expect_user_error([&] { build_encoder(read_checkpoint(folder_ / "changed"), BranchImpl::Side::Teacher); }, part);
    expect_user_error([&] { build_encoder(read_checkpoint(folder_ / "changed"), BranchImpl::Side::Teacher); },
                      "changed: ");
  }

  TemporaryFolder folder_;
  std::filesystem::path path_ = folder_ / "checkpoint-00000003.safetensors";
  at::Tensor images_ = bar_images(40);
  TrainedOn trained_on_ = {
      .images = 40, .shape = {.channels = 1, .height = 28, .width = 28}, .pixels = pixel_statistics(images_)};
  RunSettings settings_ = small_settings();
  Pretrainer pretrainer_{
      settings_.recipe,
      {.source = std::make_shared<TensorSource>(images_, at::Tensor()), .pixels = trained_on_.pixels}};
};

TEST_F(CheckpointTest, ComesBackAsItWas) {
  const Checkpoint back = read_checkpoint(path_);
  EXPECT_EQ(back.path, path_);
  EXPECT_EQ(back.step(), 3);
  EXPECT_EQ(to_toml(back.settings), to_toml(settings_));
  EXPECT_EQ(back.settings.recipe.model.encoder.in_channels, 1);
  EXPECT_EQ(back.trained_on, trained_on_);
  EXPECT_EQ(back.metrics.rows, 1);
  EXPECT_EQ(back.metrics.loss_count, 2);
  EXPECT_EQ(back.metrics.loss_sum, 1.0 / 3);
  const auto state = pretrainer_.state();
  ASSERT_EQ(back.state.size(), state.size());
  for (const auto& [name, tensor] : state) {
    EXPECT_TRUE(at::equal(back.state.at(name), tensor)) << name;
  }
}

TEST_F(CheckpointTest, EncodersGiveTheSameFeaturesAfterwards) {
  const PixelStatistics& pixels = trained_on_.pixels;
  Branch student = pretrainer_.student();
  Branch teacher = pretrainer_.teacher().model();
  const Checkpoint back = read_checkpoint(path_);
  Encoder student_back = build_encoder(back, BranchImpl::Side::Student);
  Encoder teacher_back = build_encoder(back, BranchImpl::Side::Teacher);
  EXPECT_FALSE(teacher_back->is_training());
  const at::Tensor student_features = encode(student_back, images_, pixels);
  const at::Tensor teacher_features = encode(teacher_back, images_, pixels);
  EXPECT_TRUE(at::equal(student_features, encode(student->encoder(), images_, pixels)));
  // The teacher's own layers run another kernel than the BatchNorm that it is loaded into.
  EXPECT_TRUE(at::allclose(teacher_features, encode(teacher->encoder(), images_, pixels), 1e-4, 1e-5));
  EXPECT_FALSE(at::allclose(teacher_features, student_features, 1e-4, 1e-5));
}

TEST_F(CheckpointTest, NoticesEveryByteFlippedOrCut) {
  const std::string whole = read_bytes(path_);
  const auto is_refused = [&] {
    try {
      read_checkpoint(path_);
      return false;
    } catch (const UserError&) {
      return true;
    }
  };
  ASSERT_FALSE(is_refused());
  std::fstream file(path_, std::ios::binary | std::ios::in | std::ios::out);
  const auto put = [&](size_t place, int byte) {
    file.seekp(static_cast<std::streamoff>(place));
    file.put(static_cast<char>(byte)).flush();
  };
  for (size_t place = 0; place < whole.size(); ++place) {
    put(place, whole[place] ^ (1 << place % 8));
    ASSERT_TRUE(is_refused()) << "flipped: " << place;
    put(place, whole[place]);
  }
  ASSERT_FALSE(is_refused());
  for (size_t length = whole.size(); length-- > 0;) {
    std::filesystem::resize_file(path_, length);
    ASSERT_TRUE(is_refused()) << "cut to " << length;
  }
}

TEST_F(CheckpointTest, RefusesAnotherPrograms) {
  refuse_changed([](Safetensors& c) { c.metadata.clear(); }, "no checkpoint of m2teacher");
  refuse_changed([](Safetensors& c) { c.metadata["version"] = "1"; }, "version '1', expected '2'");
  refuse_changed([](Safetensors& c) { c.metadata["config"] = "[pretrain]\nstepps = 3\n"; }, "stepps");
  refuse_changed([](Safetensors& c) { c.metadata["trained_on"] = "{"; }, "what images it was trained on");
  refuse_changed([](Safetensors& c) { c.metadata["trained_on"] = R"({"images":"many"})"; },
                 R"(trained_on: images: got "many", expected 1 to )");
  refuse_changed([](Safetensors& c) { c.tensors.erase("metrics.rows"); }, "lacks 'metrics.rows'");
  refuse_changed([](Safetensors& c) { c.tensors["metrics.loss_sum"] = at::zeros({2}, at::kDouble); },
                 "lacks 'metrics.loss_sum'");
  refuse_changed([](Safetensors& c) { c.tensors.erase("step"); }, "lacks 'step'");
}

TEST_F(CheckpointTest, RefusesImagesThatCannotBe) {
  const auto refuse = [&](const std::string& key, const std::string& value, const std::string& expected) {
    refuse_changed(
        [&](Safetensors& c) {
          std::string& text = c.metadata.at("trained_on");
          text = std::regex_replace(text, std::regex("\"" + key + R"(":(\[[^\]]*\]|\d+))"), "\"" + key + "\":" + value);
        },
        "changed: trained_on: " + key + ": got " + value + ", expected " + expected);
  };
  for (const char* value :
       {"0", "-1", "4", "20000000", "1000000000", "18446744073709551615", "2", "1.5", "true", "null"}) {
    refuse("channels", value, "1 or 3");
  }
  for (const char* value : {"0", "-5", "1.5e+300", "4611686018427387904", "[]"}) {
    refuse("images", value, "1 to 1099511627776");
    refuse("height", value, "1 to 4294967296");
    refuse("width", value, "1 to 4294967296");
  }
  for (const char* value : {"[]", "0.5", "[0.1,0.2,0.3]", "[-0.1]", "[1.5]", "[\"a\"]", "[null]"}) {
    refuse("pixel_mean", value, "a number from 0.0 to 1 for each of 1 channels");
  }
  for (const char* value : {"[]", "0.5", "[0.1,0.2,0.3]", "[0.0]", "[-0.1]", "[1e-320]", "[null]"}) {
    refuse("pixel_std", value, "a number from 0.00390625 to 1 for each of 1 channels");
  }
  // What a parser would take 70 times the memory for.
  refuse_changed([](Safetensors& c) { c.metadata["trained_on"] += std::string(2000, ' '); },
                 "what images it was trained on");
  refuse_changed([](Safetensors& c) { c.metadata["trained_on"] = "[" + c.metadata["trained_on"] + "]"; },
                 "what images it was trained on");
  refuse_changed(
      [](Safetensors& c) {
        std::string& text = c.metadata["trained_on"];
        text.replace(text.find("\"images\":40"), 11, "\"images\":3");
      },
      "changed: --batch-size: 4 is more than the 3 training images");
}

TEST_F(CheckpointTest, RefusesCountsThatCannotBe) {
  const auto refuse = [&](const char* name, const at::Tensor& value, const std::string& says) {
    refuse_changed([&](Safetensors& c) { c.tensors.at(name) = value; }, says);
  };
  const auto count = [](int64_t value) { return at::scalar_tensor(value, at::kLong); };
  refuse("step", count(-1), "'step' is -1, expected 0 to 5");
  refuse("step", count(6), "'step' is 6, expected 0 to 5");
  refuse("step", at::scalar_tensor(3.0, at::kDouble), "lacks 'step'");
  refuse("metrics.rows", count(-3), "'metrics.rows' is -3, expected 0 to 3");
  refuse("metrics.rows", count(4), "'metrics.rows' is 4, expected 0 to 3");
  refuse("metrics.loss_count", count(-1), "'metrics.loss_count' is -1, expected 0 to 3");
  refuse("metrics.loss_count", count(4), "'metrics.loss_count' is 4, expected 0 to 3");
}

TEST_F(CheckpointTest, RefusesAnotherModels) {
  const auto config = [](const std::string& from, const std::string& to) {
    return [=](Safetensors& c) {
      std::string& text = c.metadata.at("config");
      text.replace(text.find(from), from.size(), to);
    };
  };
  refuse_changed(config("widths = [3, 2]", "widths = [3, 4]"),
                 "a checkpoint of another model: 'teacher.encoder.layer2.0.");
  // What would take 154 GB to build before its tensors are compared.
  refuse_changed(config("widths = [3, 2]", "widths = [65536, 65536]"), "its settings ask for a layer of 1 x 65536");
  refuse_changed(
      [](Safetensors& c) {
        c.tensors.at("teacher.encoder.conv1.weight").fill_(std::numeric_limits<float>::quiet_NaN());
      },
      "'teacher.encoder.conv1.weight' holds values that are not finite");
  refuse_changed(config("widths = [3, 2]", "widths = [3, 2, 2]"), "a checkpoint of another model: it lacks 'teacher.");
  refuse_changed([](Safetensors& c) { c.tensors.erase("teacher.encoder.conv1.weight"); },
                 "a checkpoint of another model: it lacks 'teacher.encoder.conv1.weight'");
  refuse_changed(
      [](Safetensors& c) {
        at::Tensor& weight = c.tensors.at("teacher.encoder.conv1.weight");
        weight = weight.to(at::kDouble);
      },
      "is Double of shape [3, 1, 3, 3], expected Float of shape [3, 1, 3, 3]");
}

TEST_F(CheckpointTest, TheNewestWholeOneOfARun) {
  std::ostringstream notes;
  EXPECT_EQ(open_checkpoint(folder_ / "", notes).path, path_);
  EXPECT_EQ(notes.str(), "");
  const std::string newer = folder_ / "checkpoint-00000004.safetensors";
  write_bytes(newer, read_bytes(path_).substr(1));
  EXPECT_EQ(open_checkpoint(folder_ / "", notes).path, path_);
  EXPECT_TRUE(notes.str().starts_with("skipped: " + newer + ": ")) << notes.str();
  expect_user_error([&] { open_checkpoint(newer, notes); }, newer);
  std::filesystem::remove(path_);
  EXPECT_FALSE(newest_checkpoint(folder_ / "", notes).has_value());
  expect_user_error([&] { open_checkpoint(folder_ / "", notes); }, "holds no whole checkpoint");
}

TEST(UntrainedEncoder, StandardisesByTheImagesItWasGiven) {
  const at::Tensor images = bar_images(300);
  const PixelStatistics pixels = pixel_statistics(images);
  const EncoderOptions small = {.architecture = Architecture::Small, .in_channels = 1, .widths = {8, 12}};
  Encoder encoder = untrained_encoder(small, images, pixels, 3);
  EXPECT_FALSE(encoder->is_training());
  const auto buffers = encoder->named_buffers();
  EXPECT_EQ(buffers["bn1.num_batches_tracked"].item<int64_t>(), 20);
  Encoder same = untrained_encoder(small, images, pixels, 3);
  EXPECT_TRUE(at::equal(encode(encoder, images, pixels), encode(same, images, pixels)));
}

}  // namespace
}  // namespace m2teacher
