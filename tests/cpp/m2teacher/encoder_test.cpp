#include "models/encoder.h"

#include "models/branch.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <set>
#include <string>

namespace m2teacher {
namespace {

EncoderOptions resnet(Architecture architecture, Stem stem = Stem::Standard) {
  EncoderOptions options;
  options.architecture = architecture;
  options.in_channels = 3;
  options.stem = stem;
  return options;
}

/// A ResNet written out over a dictionary of torchvision's names, in evaluation mode.
class Textbook {
 public:
  explicit Textbook(const torch::nn::Module& module) {
    for (const auto& item : module.named_parameters()) {
      values_[item.key()] = item.value().detach();
    }
    for (const auto& item : module.named_buffers()) {
      values_[item.key()] = item.value();
    }
  }

  at::Tensor operator()(at::Tensor x, const std::vector<int>& blocks, int convolutions, Stem stem) {
    const bool standard = stem == Stem::Standard;
    x = norm("bn1", at::conv2d(x, take("conv1.weight"), {}, standard ? 2 : 1, standard ? 3 : 1)).relu();
    if (standard) {
      x = at::max_pool2d(x, 3, 2, 1);
    }
    for (size_t stage = 0; stage < blocks.size(); ++stage) {
      for (int block = 0; block < blocks[stage]; ++block) {
        const std::string prefix = "layer" + std::to_string(stage + 1) + "." + std::to_string(block) + ".";
        x = residual(prefix, x, block == 0 && stage > 0 ? 2 : 1, convolutions);
      }
    }
    return x.mean({2, 3});
  }

  /// Whether every value was used.
  bool all_used() const { return used_.size() == values_.size(); }

 private:
  at::Tensor take(const std::string& name) {
    used_.insert(name);
    return values_.at(name);
  }
  at::Tensor norm(const std::string& name, const at::Tensor& x) {
    used_.insert(name + ".num_batches_tracked");
    return at::batch_norm(x, take(name + ".weight"), take(name + ".bias"), take(name + ".running_mean"),
                          take(name + ".running_var"), false, 0.1, 1e-5, false);
  }
  at::Tensor residual(const std::string& prefix, const at::Tensor& x, int stride, int convolutions) {
    at::Tensor y = x;
    for (int i = 1; i <= convolutions; ++i) {
      const std::string number = std::to_string(i);
      const at::Tensor weight = take(prefix + "conv" + number + ".weight");
      const bool strided = i == convolutions - 1;  // the 3x3: first of a basic block, second of a bottleneck
      y = at::conv2d(y, weight, {}, strided ? stride : 1, weight.size(2) / 2);
      y = norm(prefix + "bn" + number, y);
      y = i < convolutions ? y.relu() : y;
    }
    at::Tensor shortcut = x;
    if (values_.contains(prefix + "downsample.0.weight")) {
      shortcut = norm(prefix + "downsample.1", at::conv2d(x, take(prefix + "downsample.0.weight"), {}, stride));
    }
    return (y + shortcut).relu();
  }

  std::map<std::string, at::Tensor> values_;
  std::set<std::string> used_;
};

void compare(const EncoderOptions& options, int64_t side, const std::vector<int>& blocks, int convolutions) {
  at::manual_seed(1);
  Encoder encoder(options, batch_norm());
  torch::NoGradGuard no_grad;
  encoder(at::randn({4, 3, side, side}));  // moves the statistics
  encoder->eval();
  const at::Tensor images = at::randn({2, 3, side, side});
  Textbook textbook(*encoder);
  const at::Tensor expected = textbook(images, blocks, convolutions, *options.stem);
  const at::Tensor found = encoder(images);
  EXPECT_EQ(found.sizes(), at::IntArrayRef({2, options.features()}));
  EXPECT_TRUE(at::allclose(found, expected, 1e-3, 1e-4 * expected.abs().max().item<double>()));
  EXPECT_TRUE(textbook.all_used());
}

TEST(Encoder, ResNet18IsTheTextbooks) {
  compare(resnet(Architecture::ResNet18), 64, {2, 2, 2, 2}, 2);
  compare(resnet(Architecture::ResNet18, Stem::Small), 16, {2, 2, 2, 2}, 2);
}

TEST(Encoder, ResNet50IsTheTextbooks) { compare(resnet(Architecture::ResNet50), 64, {3, 4, 6, 3}, 3); }

TEST(Encoder, FusedBatchNormHasTheNamesAndNumbersOfTorchs) {
  const EncoderOptions options = resnet(Architecture::ResNet18, Stem::Small);
  Encoder fused(options, fused_batch_norm());
  Encoder torchs(options, batch_norm());
  fused->to(at::kDouble), torchs->to(at::kDouble);
  const auto copy_all = [](const auto& from, const auto& to) {
    const torch::NoGradGuard no_grad;
    ASSERT_EQ(from.keys(), to.keys());
    for (const auto& item : from) {
      to[item.key()].copy_(item.value());
    }
  };
  copy_all(fused->named_parameters(), torchs->named_parameters());
  copy_all(fused->named_buffers(), torchs->named_buffers());
  for (const bool training : {true, true, false}) {
    fused->train(training), torchs->train(training);
    const at::Tensor images = at::randn({3, 3, 16, 16}, at::kDouble);
    const at::Tensor expected = torchs(images);
    const at::Tensor found = fused(images);
    EXPECT_TRUE(at::allclose(found, expected, 1e-9, 1e-9));
    if (training) {
      expected.square().sum().backward(), found.square().sum().backward();
    }
  }
  const auto gradients = torchs->named_parameters();
  for (const auto& item : fused->named_parameters()) {
    const at::Tensor& expected = gradients[item.key()].grad();
    const double scale = expected.abs().max().item<double>();
    EXPECT_TRUE(at::allclose(item.value().grad(), expected, 1e-7, 1e-7 * scale)) << item.key();
  }
  const auto buffers = torchs->named_buffers();
  for (const auto& item : fused->named_buffers()) {
    EXPECT_TRUE(at::allclose(item.value().to(at::kDouble), buffers[item.key()].to(at::kDouble), 1e-9, 1e-9))
        << item.key();
  }
}

int64_t parameters(const EncoderOptions& options) {
  int64_t count = 0;
  for (const at::Tensor& parameter : Encoder(options, batch_norm())->parameters()) {
    count += parameter.numel();
  }
  return count;
}

TEST(Encoder, HasAsManyParametersAsTorchvisionsWithoutItsClassifier) {
  EXPECT_EQ(parameters(resnet(Architecture::ResNet18)), 11'689'512 - 513'000);
  EXPECT_EQ(parameters(resnet(Architecture::ResNet50)), 25'557'032 - 2'049'000);
}

TEST(Branch, SizesOfProjectorAndPredictor) {
  BranchOptions options;
  options.encoder = {.architecture = Architecture::Small, .in_channels = 1, .widths = {8}};
  options.projector_hidden = 20;
  options.predictor_hidden = 30;
  options.projector_out = 10;
  Branch student(options, BranchImpl::Side::Student, batch_norm());
  const auto named = student->named_parameters();
  EXPECT_EQ(named["projector.fc1.weight"].sizes(), at::IntArrayRef({20, 32}));
  EXPECT_EQ(named["projector.fc2.weight"].sizes(), at::IntArrayRef({10, 20}));
  EXPECT_EQ(named["predictor.fc1.weight"].sizes(), at::IntArrayRef({30, 10}));
  EXPECT_EQ(student(at::randn({2, 1, 28, 28})).sizes(), at::IntArrayRef({2, 10}));
}

}  // namespace
}  // namespace m2teacher
