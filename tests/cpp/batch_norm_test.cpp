#include "snapshots.h"

#include <gtest/gtest.h>
#include <momentum_bn/batch_norm.h>
#include <momentum_bn/modules.h>
#include <momentum_bn/teacher.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/serialize.h>

#include <functional>
#include <sstream>
#include <string>
#include <vector>

namespace momentum_bn {
namespace {

using testing::expect_close;
using testing::randn;
using testing::randomise_parameters;
using testing::same_bits;

/// A layer of ours, and torch's with what a network writes behind it.
struct OptionCase {
  std::string name;
  std::function<void(BatchNormOptions&, torch::nn::BatchNormOptions&)> apply;
  bool relu = false;
  bool residual = false;
};

std::vector<OptionCase> option_cases() {
  return {
      {"default", [](auto&, auto&) {}},
      {"cumulative", [](auto& o, auto& t) { o.momentum(std::nullopt), t.momentum(std::nullopt); }},
      {"momentum_and_eps", [](auto& o, auto& t) { o.momentum(0.7).eps(1e-3), t.momentum(0.7).eps(1e-3); }},
      {"not_affine", [](auto& o, auto& t) { o.affine(false), t.affine(false); }},
      {"untracked", [](auto& o, auto& t) { o.track_running_stats(false), t.track_running_stats(false); }},
      {"relu", [](auto& o, auto&) { o.activation(Activation::ReLU); }, true},
      {"residual_and_relu", [](auto& o, auto&) { o.activation(Activation::ReLU).inplace(true); }, true, true},
  };
}

template <typename Ours, typename Torchs>
void numbers_are_torchs(const std::vector<int64_t>& shape) {
  for (const OptionCase& options_case : option_cases()) {
    SCOPED_TRACE(options_case.name);
    BatchNormOptions options(shape[1]);
    options.dtype(at::kDouble);
    torch::nn::BatchNormOptions torch_options(shape[1]);
    options_case.apply(options, torch_options);
    Ours ours = randomise_parameters(Ours(options));
    Torchs torchs(torch_options);
    torchs->to(at::kDouble);
    randomise_parameters(torchs);
    for (int64_t step = 0; step < 5; ++step) {
      const bool training = step < 3;
      ours->train(training), torchs->train(training);
      const at::Tensor g = randn(shape, 50 + step);
      const at::Tensor residual = options_case.residual ? randn(shape, 90 + step) : at::Tensor();
      std::vector<at::Tensor> outputs;
      std::vector<at::Tensor> gradients;
      for (const bool mine : {true, false}) {
        at::Tensor x = (randn(shape, step) * (1 + step) + step).requires_grad_();
        at::Tensor y;
        if (mine) {
          y = ours->forward(x * 1, residual);
        } else {
          y = torchs->forward(x);
          y = residual.defined() ? y + residual : y;
          y = options_case.relu ? y.relu() : y;
        }
        y.backward(g);
        outputs.push_back(y.detach());
        gradients.push_back(x.grad());
      }
      expect_close(outputs[0], outputs[1], 1e-12, "y");
      expect_close(gradients[0], gradients[1], 1e-12, "dx");
    }
    const auto parameters = torchs->named_parameters();
    for (const auto& item : ours->named_parameters()) {
      expect_close(item.value().grad(), parameters[item.key()].grad(), 1e-12, item.key());
    }
    const auto buffers = torchs->named_buffers();
    ASSERT_EQ(ours->named_buffers().size(), buffers.size());
    for (const auto& item : ours->named_buffers()) {
      expect_close(item.value(), buffers[item.key()], 1e-12, item.key());
    }
  }
}

TEST(BatchNorm1d, NumbersAreTorchs) {
  numbers_are_torchs<BatchNorm1d, torch::nn::BatchNorm1d>({6, 5});
  numbers_are_torchs<BatchNorm1d, torch::nn::BatchNorm1d>({4, 5, 7});
}

TEST(BatchNorm2d, NumbersAreTorchs) { numbers_are_torchs<BatchNorm2d, torch::nn::BatchNorm2d>({4, 5, 3, 6}); }

TEST(BatchNorm3d, NumbersAreTorchs) { numbers_are_torchs<BatchNorm3d, torch::nn::BatchNorm3d>({2, 5, 3, 2, 4}); }

TEST(BatchNorm2d, NewLayerHasTorchsNames) {
  const auto names = [](const auto& layer) {
    auto keys = layer->named_parameters().keys();
    const auto buffers = layer->named_buffers().keys();
    keys.insert(keys.end(), buffers.begin(), buffers.end());
    return keys;
  };
  EXPECT_EQ(names(BatchNorm2d(3)), names(torch::nn::BatchNorm2d(3)));
  BatchNorm2d without_bias(BatchNormOptions(3).bias(false));
  EXPECT_FALSE(without_bias->bias.defined());
  EXPECT_EQ(without_bias->forward(at::rand({4, 3, 2, 2})).sizes(), at::IntArrayRef({4, 3, 2, 2}));
}

template <typename From, typename To>
void expect_loads(From from, To to) {
  from->forward(randn({4, 3, 2, 2}, 1, at::kFloat));
  std::stringstream archive;
  torch::save(from, archive);
  torch::load(to, archive);
  const auto expected = from->named_buffers();
  for (const auto& item : to->named_buffers()) {
    EXPECT_TRUE(same_bits(item.value(), expected[item.key()])) << item.key();
  }
  EXPECT_TRUE(same_bits(to->weight, from->weight));
  const at::Tensor x = randn({4, 3, 2, 2}, 2, at::kFloat);
  expect_close(to->forward(x), from->forward(x), 1e-5);
}

TEST(BatchNorm2d, ArchivesAreTorchsBothWays) {
  expect_loads(randomise_parameters(BatchNorm2d(3)), BatchNorm2d(3));
  expect_loads(randomise_parameters(BatchNorm2d(3)), torch::nn::BatchNorm2d(3));
  expect_loads(randomise_parameters(torch::nn::BatchNorm2d(3)), BatchNorm2d(3));
  torch::nn::BatchNorm2d wrong(torch::nn::BatchNormOptions(3).affine(false));
  std::stringstream archive;
  torch::save(wrong, archive);
  BatchNorm2d layer(3);
  layer->forward(at::rand({4, 3, 2, 2}));
  const at::Tensor before = layer->running_mean.clone();
  EXPECT_THROW(torch::load(layer, archive), c10::Error);
  EXPECT_TRUE(same_bits(layer->running_mean, before));
}

TEST(BatchNorm2d, CloneGoesOnBitForBit) {
  BatchNorm2d layer(BatchNormOptions(3).momentum(std::nullopt).activation(Activation::ReLU).eps(1e-3));
  layer->forward(at::rand({4, 3, 2, 2}));
  BatchNorm2d copy(std::dynamic_pointer_cast<BatchNorm2dImpl>(layer->clone()));
  EXPECT_EQ(copy->options.activation(), Activation::ReLU);
  EXPECT_EQ(copy->options.momentum(), std::nullopt);
  const at::Tensor x = at::rand({4, 3, 2, 2});
  EXPECT_TRUE(same_bits(copy->forward(x), layer->forward(x)));
  EXPECT_TRUE(same_bits(copy->running_var, layer->running_var));
  EXPECT_FALSE(copy->running_var.is_same(layer->running_var));
}

TEST(BatchNorm2d, CastsKeepTheCounter) {
  for (const bool nested : {false, true}) {
    BatchNorm2d layer(3);
    for (int i = 0; i < 3; ++i) {
      layer->forward(at::rand({4, 3, 2, 2}));
    }
    if (nested) {
      torch::nn::ModuleList(layer)->to(at::kBFloat16);
    } else {
      layer->to(at::kCPU, at::kBFloat16);
    }
    EXPECT_EQ(layer->running_mean.scalar_type(), at::kBFloat16);
    EXPECT_EQ(layer->num_batches_tracked.scalar_type(), at::kLong);
    EXPECT_EQ(layer->num_batches_tracked.item<int64_t>(), 3);
    EXPECT_EQ(layer->forward(at::rand({4, 3, 2, 2}).to(at::kBFloat16)).scalar_type(), at::kBFloat16);
  }
  BatchNorm2d untracked(BatchNormOptions(3).track_running_stats(false));
  untracked->to(at::kDouble);
  EXPECT_EQ(untracked->weight.scalar_type(), at::kDouble);
}

TEST(BatchNorm2d, InplaceTakesMemoryWhereNoGradientIsRecorded) {
  const auto takes = [](BatchNorm2d layer, const at::Tensor& x) {
    return layer->forward(x).data_ptr() == x.data_ptr();
  };
  for (const bool training : {true, false}) {
    BatchNorm2d layer(BatchNormOptions(3).inplace(true));
    layer->train(training);
    EXPECT_FALSE(takes(layer, at::rand({4, 3, 2, 2})));
    {
      const torch::NoGradGuard no_grad;
      EXPECT_TRUE(takes(layer, at::rand({4, 3, 2, 2})));
    }
    for (auto& parameter : layer->parameters()) {
      parameter.set_requires_grad(false);
    }
    EXPECT_TRUE(takes(layer, at::rand({4, 3, 2, 2})));
    EXPECT_EQ(takes(layer, at::rand({4, 3, 2, 2}).requires_grad_() * 1), !training);
  }
}

TEST(BatchNorm2d, ResetMakesAllOfItNew) {
  BatchNorm2d layer = randomise_parameters(BatchNorm2d(3));
  layer->forward(at::rand({4, 3, 2, 2}));
  layer->reset_parameters();
  BatchNorm2d fresh(3);
  for (const auto& item : fresh->named_buffers()) {
    EXPECT_TRUE(same_bits(layer->named_buffers()[item.key()], item.value())) << item.key();
  }
  EXPECT_TRUE(same_bits(layer->weight, fresh->weight) && same_bits(layer->bias, fresh->bias));
}

TEST(BatchNorm2d, EmptyInputIsNotCounted) {
  BatchNorm2d layer(3);
  EXPECT_EQ(layer->forward(at::empty({0, 3, 2, 2})).sizes(), at::IntArrayRef({0, 3, 2, 2}));
  EXPECT_EQ(layer->num_batches_tracked.item<int64_t>(), 0);
}

TEST(BatchNorm2d, WorksInSequential) {
  torch::nn::Sequential network(torch::nn::Linear(4, 3), BatchNorm1d(BatchNormOptions(3).activation(Activation::ReLU)));
  EXPECT_GE(network->forward(at::rand({5, 4})).min().item<float>(), 0);
}

TEST(BatchNorm2d, PrintsItsOptions) {
  std::ostringstream text;
  text << *BatchNorm2d(BatchNormOptions(3).momentum(std::nullopt).activation(Activation::ReLU));
  EXPECT_EQ(text.str(),
            "momentum_bn::BatchNorm2d(3, eps=1e-05, momentum=None, affine=true, track_running_stats=true, "
            "activation=relu)");
}

template <typename Error>
std::string words_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what_without_backtrace();
  }
  ADD_FAILURE() << "no error";
  return "";
}

TEST(BatchNorm2d, ErrorsNameWhatIsWrong) {
  const auto contains = [](const std::string& words, const std::string& part) {
    EXPECT_NE(words.find(part), std::string::npos) << words;
  };
  const BatchNormOptions o(3);
  const auto build = [](const BatchNormOptions& options) { return [options] { BatchNorm2d{options}; }; };
  contains(words_of<c10::ValueError>(build(BatchNormOptions(o).eps(0))), "eps");
  contains(words_of<c10::ValueError>(build(BatchNormOptions(o).momentum(1.5))), "momentum");
  contains(words_of<c10::ValueError>(build(BatchNormOptions(o).process_group("nobody"))), "nobody");
  contains(words_of<c10::ValueError>(build(BatchNormOptions(-1))), "num_features");
  BatchNorm2d layer(3);
  contains(words_of<c10::ValueError>([&] { layer->forward(at::rand({4, 3, 2})); }), "expected 4D input (got 3D input)");
  contains(words_of<c10::ValueError>([&] { layer->forward(at::rand({4, 5, 2, 2})); }), "3 channels");
  contains(words_of<c10::ValueError>([&] { layer->forward(at::rand({1, 3, 1, 1})); }),
           "Expected more than 1 value per channel when training, got input size");
  contains(words_of<c10::TypeError>([&] { layer->forward(at::ones({4, 3, 2, 2}, at::kLong)); }), "Long");
  EXPECT_EQ(layer->num_batches_tracked.item<int64_t>(), 0);
}

TEST(MomentumBatchNorm2d, GradientsThroughTheStatistics) {
  // With all the weight on the batch, and its biased variance, the layer is torch's BatchNorm.
  MomentumBatchNorm2d ours(
      MomentumBatchNormOptions(3).variance(Variance::Biased).detach_statistics(false).dtype(at::kDouble));
  torch::nn::BatchNorm2d torchs(3);
  torchs->to(at::kDouble);
  randomise_parameters(ours), randomise_parameters(torchs);
  const at::Tensor g = randn({4, 3, 5, 2}, 2);
  std::vector<at::Tensor> gradients;
  for (const bool mine : {true, false}) {
    at::Tensor x = randn({4, 3, 5, 2}, 1).requires_grad_();
    (mine ? ours->forward(x) : torchs->forward(x)).backward(g);
    gradients.push_back(x.grad());
  }
  expect_close(gradients[0], gradients[1], 1e-12, "dx");
  expect_close(ours->weight.grad(), torchs->weight.grad(), 1e-12, "dweight");
  std::ostringstream text;
  text << *ours;
  EXPECT_NE(text.str().find("detach_statistics=false"), std::string::npos) << text.str();
  MomentumBatchNorm2d copy(std::dynamic_pointer_cast<MomentumBatchNorm2dImpl>(ours->clone()));
  EXPECT_FALSE(copy->options.detach_statistics());
}

TEST(BatchNorm2d, AStudentOfTheseHasATeacherOfMomentumLayers) {
  torch::nn::Sequential student(torch::nn::Linear(4, 3), BatchNorm1d(3));
  MomentumBatchNorm1d layer(3);
  torch::nn::Sequential teacher_network(torch::nn::Linear(4, 3), layer);
  MomentumTeacher<torch::nn::Sequential> teacher(student, teacher_network, /*total_iters=*/17);
  EXPECT_EQ(layer->total_iters(), 17);
  set_total_iters(*student, 5);  // finds nothing there
}

}  // namespace
}  // namespace momentum_bn
