#include "checkpoint/checkpoint.h"

#include "checkpoint/safetensors.h"
#include "eval/features.h"
#include "expect_user_error.h"
#include "synthetic_images.h"
#include "temporary_folder.h"

namespace m2teacher {
namespace {

class Checkpoint : public testing::Test {
 protected:
  static PretrainOptions recipe() {
    PretrainOptions options = fashion_mnist_recipe();
    options.model.encoder.widths = {8, 12};
    options.model.projector_hidden = 16;
    options.model.predictor_hidden = 16;
    options.model.projector_out = 8;
    options.warmup_steps = 1;
    options.steps = 3;
    options.batch_size = 8;
    return options;
  }
  void SetUp() override {
    for (int step = 0; step < 3; ++step) {
      pretrainer_.step();
    }
    save_checkpoint(path_, pretrainer_);
  }
  /// Loads what `change` makes of the saved contents.
  template <typename Change>
  void refuse_changed(const Change& change, const std::string& part) {
    Safetensors contents = read_safetensors(path_);
    change(contents);
    write_safetensors(folder_ / "changed", contents);
    expect_user_error([&] { load_encoder(folder_ / "changed", BranchImpl::Side::Teacher); }, part);
  }

  TemporaryFolder folder_;
  std::filesystem::path path_ = folder_ / "checkpoint.safetensors";
  at::Tensor images_ = bar_images(40);
  PixelStatistics pixels_ = pixel_statistics(images_);
  Pretrainer pretrainer_{recipe(), {.source = std::make_shared<TensorSource>(images_, at::Tensor()), .pixels = pixels_}};
};

TEST_F(Checkpoint, EncodersGiveTheSameFeaturesAfterwards) {
  Branch student = pretrainer_.student();
  Branch teacher = pretrainer_.teacher().model();
  Encoder student_back = load_encoder(path_, BranchImpl::Side::Student);
  Encoder teacher_back = load_encoder(path_, BranchImpl::Side::Teacher);
  EXPECT_TRUE(at::equal(encode(student_back, images_, pixels_), encode(student->encoder(), images_, pixels_)));
  // The teacher's own layers run another kernel than the BatchNorm that it is loaded into.
  EXPECT_TRUE(at::allclose(encode(teacher_back, images_, pixels_), encode(teacher->encoder(), images_, pixels_), 1e-4, 1e-5));
  EXPECT_FALSE(at::allclose(encode(teacher_back, images_, pixels_), encode(student_back, images_, pixels_), 1e-4, 1e-5));
  EXPECT_EQ(read_checkpoint_info(path_).encoder.widths, recipe().model.encoder.widths);
}

TEST_F(Checkpoint, HoldsEverythingOfBothNetworks) {
  const Safetensors contents = read_safetensors(path_);
  EXPECT_TRUE(contents.tensors.contains("student.predictor.fc2.weight"));
  EXPECT_TRUE(contents.tensors.contains("student.encoder.bn1.running_var"));
  EXPECT_TRUE(contents.tensors.contains("teacher.encoder.layer2.0.downsample.1.momentum_state"));
  EXPECT_TRUE(contents.tensors.contains("teacher.projector.bn.view_count"));
  EXPECT_FALSE(contents.tensors.contains("teacher.predictor.fc2.weight"));
}

TEST_F(Checkpoint, RefusesAnotherModels) {
  refuse_changed([](Safetensors& c) { c.metadata.clear(); }, "no checkpoint of m2teacher");
  refuse_changed([](Safetensors& c) { c.metadata["version"] = "2"; }, "version '2', expected '1'");
  refuse_changed([](Safetensors& c) { c.metadata["settings"] = "{"; }, "do not say how the encoder is built");
  refuse_changed([](Safetensors& c) { c.metadata["settings"] = R"({"in_channels":1,"pool":2,"widths":[]})"; },
                 "do not say how the encoder is built");
  refuse_changed([](Safetensors& c) { c.metadata["settings"] = R"({"in_channels":1,"pool":2,"widths":[8,9999999]})"; },
                 "do not say how the encoder is built");
  refuse_changed([](Safetensors& c) { c.metadata["settings"] = R"({"in_channels":1,"pool":2,"widths":[8,16]})"; },
                 "a checkpoint of another model: 'teacher.encoder.layer2.0.");
  refuse_changed([](Safetensors& c) { c.metadata["settings"] = R"({"in_channels":1,"pool":0,"widths":[8]})"; },
                 "do not say how the encoder is built");
  refuse_changed([](Safetensors& c) { c.tensors.erase("teacher.encoder.conv1.weight"); },
                 "a checkpoint of another model: it lacks 'teacher.encoder.conv1.weight'");
  refuse_changed(
      [](Safetensors& c) {
        at::Tensor& weight = c.tensors.at("teacher.encoder.conv1.weight");
        weight = weight.to(at::kDouble);
      },
      "is Double of shape [8, 1, 3, 3], expected Float of shape [8, 1, 3, 3]");
}

TEST(UntrainedEncoder, StandardisesByTheImagesItWasGiven) {
  const at::Tensor images = bar_images(300);
  const EncoderOptions small = {.architecture = Architecture::Small, .in_channels = 1, .widths = {8, 12}};
  Encoder encoder = untrained_encoder(small, images, pixel_statistics(images), 3);
  EXPECT_FALSE(encoder->is_training());
  const auto buffers = encoder->named_buffers();
  EXPECT_EQ(buffers["bn1.num_batches_tracked"].item<int64_t>(), 20);
  Encoder same = untrained_encoder(small, images, pixel_statistics(images), 3);
  EXPECT_TRUE(at::equal(encode(encoder, images, pixel_statistics(images)), encode(same, images, pixel_statistics(images))));
}

}  // namespace
}  // namespace m2teacher
