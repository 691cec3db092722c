#include "oracle.h"
#include "snapshots.h"

#include <gtest/gtest.h>
#include <momentum_bn/modules.h>
#include <momentum_bn/show_config.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/conv.h>

#include <array>
#include <functional>
#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace momentum_bn {
namespace {

using testing::expect_close;
using testing::expect_same;
using testing::randn;
using testing::randomise_parameters;
using testing::same_bits;
using testing::snapshot;

struct OptionCase {
  std::string name;
  std::function<void(MomentumBatchNormOptions&, oracle::MomentumBatchNorm&)> apply;
};

std::vector<OptionCase> option_cases() {
  return {
      {"published", [](auto&, auto&) {}},
      {"unbiased", [](auto& o, auto& r) { o.variance(Variance::Unbiased), r.variance = "unbiased"; }},
      {"biased", [](auto& o, auto& r) { o.variance(Variance::Biased), r.variance = "biased"; }},
      {"one_view", [](auto& o, auto& r) { o.views_per_update(1), r.views_per_update = 1; }},
      {"three_views_relu",
       [](auto& o, auto& r) {
         o.views_per_update(3).activation(Activation::ReLU);
         r.views_per_update = 3, r.relu = true;
       }},
      {"constant",
       [](auto& o, auto& r) {
         o.schedule(Schedule::Constant).momentum(0.3);
         r.cosine = false, r.momentum = 0.3;
       }},
      {"cumulative", [](auto& o, auto& r) { o.momentum(std::nullopt), r.momentum = std::nullopt; }},
      {"short_schedule", [](auto& o, auto& r) { o.total_iters(7).eps(0.1), r.total_iters = 7, r.eps = 0.1; }},
  };
}

template <typename Layer>
void two_hundred_forwards_equal_the_oracle(std::vector<int64_t> shape) {
  for (const OptionCase& options_case : option_cases()) {
    SCOPED_TRACE(options_case.name);
    MomentumBatchNormOptions options(5);
    oracle::MomentumBatchNorm reference(5);
    options.dtype(at::kDouble);
    options_case.apply(options, reference);
    Layer layer = randomise_parameters(Layer(options));
    for (int64_t step = 0; step < 200; ++step) {
      shape[0] = std::array<int64_t, 5>{2, 3, 8, 17, 32}[step * 7 % 5];
      const at::Tensor x = randn(shape, step) * (1 + step % 3) + (step % 4 - 1.5);
      const at::Tensor residual = step % 2 ? randn(shape, 1000 + step) : at::Tensor();
      const at::Tensor expected = reference.train_forward(x, layer->weight, layer->bias, residual);
      expect_close(layer->forward(x, residual), expected, 1e-12, "y at step " + std::to_string(step));
      expect_close(layer->running_mean, reference.running_mean, 1e-12, "running_mean");
      expect_close(layer->running_var, reference.running_var, 1e-12, "running_var");
      expect_close(layer->view_mean_sum, reference.view_mean_sum, 1e-12, "view_mean_sum");
      expect_close(layer->view_var_sum, reference.view_var_sum, 1e-12, "view_var_sum");
      ASSERT_EQ(layer->cur_iter(), reference.cur_iter);
      ASSERT_EQ(layer->view_count.template item<int64_t>(), reference.view_count);
      ASSERT_EQ(layer->num_batches_tracked.template item<int64_t>(), step + 1);
      ASSERT_EQ(layer->momentum().has_value(), reference.momentum.has_value());
      ASSERT_NEAR(layer->momentum().value_or(-1), reference.momentum.value_or(-1), 1e-15);
      if (::testing::Test::HasFailure()) {
        return;
      }
    }
  }
}

TEST(MomentumBatchNorm1d, TwoHundredForwardsEqualTheOracle) {
  two_hundred_forwards_equal_the_oracle<MomentumBatchNorm1d>({0, 5});
  two_hundred_forwards_equal_the_oracle<MomentumBatchNorm1d>({0, 5, 3});
}

TEST(MomentumBatchNorm2d, TwoHundredForwardsEqualTheOracle) {
  two_hundred_forwards_equal_the_oracle<MomentumBatchNorm2d>({0, 5, 4, 2});
}

TEST(MomentumBatchNorm3d, TwoHundredForwardsEqualTheOracle) {
  two_hundred_forwards_equal_the_oracle<MomentumBatchNorm3d>({0, 5, 3, 2, 2});
}

TEST(MomentumBatchNorm2d, NewLayer) {
  MomentumBatchNorm2d layer(3);
  const auto names = layer->named_buffers().keys();
  EXPECT_EQ(names, (std::vector<std::string>{"running_mean", "running_var", "num_batches_tracked", "view_mean_sum",
                                             "view_var_sum", "view_count", "cur_iter_state", "momentum_state"}));
  EXPECT_EQ(layer->named_parameters().keys(), (std::vector<std::string>{"weight", "bias"}));
  EXPECT_TRUE(layer->weight.equal(at::ones({3})));
  EXPECT_TRUE(layer->bias.equal(at::zeros({3})));
  EXPECT_EQ(layer->momentum(), 1.0);
  EXPECT_EQ(layer->cur_iter(), 0);
  EXPECT_EQ(layer->total_iters(), 100);
  EXPECT_EQ(layer->momentum_state.scalar_type(), at::kDouble);
}

TEST(MomentumBatchNorm2d, AffineBiasAndTracking) {
  EXPECT_TRUE(MomentumBatchNorm2d(MomentumBatchNormOptions(3).affine(false))->parameters().empty());
  MomentumBatchNorm2d without_bias(MomentumBatchNormOptions(3).bias(false));
  EXPECT_EQ(without_bias->named_parameters().keys(), std::vector<std::string>{"weight"});
  MomentumBatchNorm2d untracked(MomentumBatchNormOptions(3).track_running_stats(false).momentum(0.25));
  EXPECT_TRUE(untracked->buffers().empty());
  EXPECT_EQ(untracked->momentum(), 0.25);
  EXPECT_EQ(untracked->cur_iter(), 0);
  const at::Tensor x = randn({4, 3, 2, 2}, 0, at::kFloat);
  const at::Tensor expected =
      oracle::MomentumBatchNorm(3).train_forward(x);  // a new layer's first forward: the batch alone
  expect_close(untracked->forward(x), expected, 1e-6);
  untracked->eval();
  expect_close(untracked->forward(x), expected, 1e-6);
}

TEST(MomentumBatchNorm2d, DeviceAndDtypeOptions) {
  MomentumBatchNorm2d meta(MomentumBatchNormOptions(3).device(at::kMeta).dtype(at::kBFloat16));
  EXPECT_TRUE(meta->weight.is_meta());
  EXPECT_TRUE(meta->momentum_state.is_meta());
  EXPECT_EQ(meta->running_mean.scalar_type(), at::kBFloat16);
  EXPECT_EQ(meta->momentum_state.scalar_type(), at::kDouble);
}

TEST(MomentumBatchNorm2d, AccessorsAssignAndKeepEachOther) {
  for (const bool tracked : {true, false}) {
    MomentumBatchNorm2d layer(MomentumBatchNormOptions(3).views_per_update(1).track_running_stats(tracked));
    layer->set_cur_iter(30);
    EXPECT_EQ(layer->cur_iter(), 30);
    EXPECT_EQ(layer->momentum(), 1.0);
    layer->set_total_iters(1000);
    layer->momentum_cosine_decay();
    EXPECT_EQ(layer->cur_iter(), 31);
    EXPECT_NEAR(*layer->momentum(), oracle::cosine_schedule(31, 1000), 1e-15);
    layer->set_momentum(0.125);
    EXPECT_EQ(layer->momentum(), 0.125);
    layer->set_momentum(std::nullopt);
    EXPECT_FALSE(layer->momentum().has_value());
    layer->set_cur_iter(5000);
    layer->set_momentum(0.5);
    layer->momentum_cosine_decay();
    EXPECT_EQ(layer->momentum(), 0.0) << "past total_iters the momentum stays 0";
  }
}

TEST(MomentumBatchNorm2d, EvaluationUsesRunningStatisticsAndChangesNothing) {
  MomentumBatchNorm2d layer = randomise_parameters(MomentumBatchNorm2d(MomentumBatchNormOptions(3).momentum(0.7)));
  for (int64_t step = 0; step < 3; ++step) {
    layer->forward(randn({4, 3, 5, 5}, step, at::kFloat) * 2 + 1);
  }
  layer->eval();
  const at::Tensor x = randn({4, 3, 5, 5}, 9, at::kFloat);
  const auto before = snapshot(layer);
  const at::Tensor y = layer->forward(x);
  expect_same(snapshot(layer), before);
  EXPECT_TRUE(same_bits(y, at::batch_norm(x, layer->weight, layer->bias, layer->running_mean, layer->running_var, false,
                                          0.0, layer->options.eps(), false)));
}

TEST(MomentumBatchNorm2d, EmptyInputIsNotCounted) {
  MomentumBatchNorm2d layer(3);
  layer->forward(randn({4, 3, 5, 5}, 0, at::kFloat));
  const auto before = snapshot(layer);
  EXPECT_EQ(layer->forward(at::empty({0, 3, 5, 5})).sizes(), (at::IntArrayRef{0, 3, 5, 5}));
  expect_same(snapshot(layer), before);
}

TEST(MomentumBatchNorm2d, MemoryFormatsAndDtypes) {
  for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    const at::Tensor plain = randn({2, 37, 3, 5}, 0, dtype);
    const std::vector<at::Tensor> inputs = {plain, plain.contiguous(at::MemoryFormat::ChannelsLast),
                                            plain.permute({2, 1, 3, 0}), plain.slice(3, 0, 5, 2),
                                            plain.slice(0, 0, 1).expand({4, 37, 3, 5})};
    for (const at::Tensor& x : inputs) {
      MomentumBatchNorm2d layer = randomise_parameters(
          MomentumBatchNorm2d(MomentumBatchNormOptions(37).dtype(dtype == at::kDouble ? at::kDouble : at::kFloat)));
      const at::Tensor y = layer->forward(x);
      EXPECT_EQ(y.scalar_type(), dtype);
      EXPECT_TRUE(y.is_contiguous(x.suggest_memory_format()));
      const double tolerance = dtype == at::kDouble  ? 1e-12
                               : dtype == at::kFloat ? 2e-6
                               : dtype == at::kHalf  ? 0x1p-9
                                                     : 0x1p-6;
      expect_close(y, oracle::MomentumBatchNorm(37).train_forward(x, layer->weight, layer->bias), tolerance);
    }
  }
}

TEST(MomentumBatchNorm2d, GradientsEqualAutogradThroughTheOracle) {
  for (const bool relu : {false, true}) {
    MomentumBatchNorm2d layer = randomise_parameters(MomentumBatchNorm2d(
        MomentumBatchNormOptions(4).dtype(at::kDouble).activation(relu ? Activation::ReLU : Activation::None)));
    oracle::MomentumBatchNorm reference(4);
    reference.relu = relu;
    const auto leaf = [](const at::Tensor& value) { return value.detach().clone().requires_grad_(); };
    const at::Tensor weight = leaf(layer->weight);
    const at::Tensor bias = leaf(layer->bias);
    std::vector<at::Tensor> gradients[2];
    for (const bool ours : {false, true}) {
      const at::Tensor x = leaf(randn({3, 4, 5, 2}, 1));
      const at::Tensor residual = leaf(randn({3, 4, 5, 2}, 2));
      const at::Tensor y = ours ? layer->forward(x, residual) : reference.train_forward(x, weight, bias, residual);
      y.backward(randn({3, 4, 5, 2}, 3));
      gradients[ours] = {x.grad(), residual.grad(), ours ? layer->weight.grad() : weight.grad(),
                         ours ? layer->bias.grad() : bias.grad()};
    }
    for (size_t i = 0; i < gradients[0].size(); ++i) {
      expect_close(gradients[1][i], gradients[0][i], 1e-12);
    }
  }
}

TEST(MomentumBatchNorm2d, StateNeverRecordsAGraph) {
  MomentumBatchNorm2d layer(3);
  for (int64_t step = 0; step < 5; ++step) {
    layer->forward(randn({4, 3, 2, 2}, step, at::kFloat).requires_grad_()).sum().backward();
    for (const at::Tensor& buffer : layer->buffers()) {
      EXPECT_FALSE(buffer.requires_grad());
      EXPECT_FALSE(buffer.grad_fn());
    }
  }
}

TEST(MomentumBatchNorm2d, InplaceTakesMemoryExactlyWhereNoGradientNeedsTheInput) {
  MomentumBatchNorm2d layer(MomentumBatchNormOptions(3).inplace(true).activation(Activation::ReLU));
  const at::Tensor kept = randn({4, 3, 2, 2}, 0, at::kFloat);
  EXPECT_NE(layer->forward(kept).data_ptr(), kept.data_ptr());
  {
    const at::NoGradGuard no_grad;
    const at::Tensor taken = kept.clone();
    MomentumBatchNorm2d fresh(MomentumBatchNormOptions(3).inplace(true).activation(Activation::ReLU));
    MomentumBatchNorm2d other(MomentumBatchNormOptions(3).activation(Activation::ReLU));
    const at::Tensor y = fresh->forward(taken);
    EXPECT_EQ(y.data_ptr(), taken.data_ptr());
    EXPECT_GT(taken._version(), 0);
    EXPECT_TRUE(same_bits(y, other->forward(kept)));
  }
  layer->weight.requires_grad_(false);
  const at::Tensor taken = kept.clone();
  EXPECT_EQ(layer->forward(taken).data_ptr(), taken.data_ptr());
  const auto before = snapshot(layer);
  EXPECT_THROW(layer->forward(kept.clone().requires_grad_()), c10::Error);
  expect_same(snapshot(layer), before);
}

TEST(MomentumBatchNorm2d, SameBitsWhateverTheNumberOfThreads) {
  const int threads = at::get_num_threads();
  for (const auto format : {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast}) {
    std::vector<std::vector<at::Tensor>> results;
    for (const int count : {1, 2, 3, 4}) {
      at::set_num_threads(count);
      MomentumBatchNorm2d layer(37);
      const at::Tensor x = randn({3, 37, 31, 29}, 0, at::kFloat).contiguous(format).requires_grad_();
      const at::Tensor y = layer->forward(x);
      y.backward(randn({3, 37, 31, 29}, 1, at::kFloat));
      results.push_back(
          {y, x.grad(), layer->weight.grad(), layer->bias.grad(), layer->view_mean_sum, layer->view_var_sum});
    }
    for (size_t i = 1; i < results.size(); ++i) {
      for (size_t j = 0; j < results[i].size(); ++j) {
        EXPECT_TRUE(same_bits(results[i][j], results[0][j])) << i << " " << j;
      }
    }
  }
  at::set_num_threads(threads);
}

TEST(MomentumBatchNorm2d, WorksInSequentialWithoutResidual) {
  torch::nn::Sequential network(torch::nn::Conv2d(torch::nn::Conv2dOptions(3, 4, 3)), MomentumBatchNorm2d(4));
  EXPECT_EQ(network->forward(randn({2, 3, 8, 8}, 0, at::kFloat)).sizes(), (at::IntArrayRef{2, 4, 6, 6}));
}

TEST(MomentumBatchNorm2d, PrintsItsOptions) {
  std::ostringstream stream;
  stream << MomentumBatchNorm2d(MomentumBatchNormOptions(7).total_iters(123).variance(Variance::Biased));
  for (const char* part : {"MomentumBatchNorm2d", "7", "123", "biased"}) {
    EXPECT_NE(stream.str().find(part), std::string::npos) << stream.str();
  }
}

TEST(MomentumBatchNorm, SetTotalItersReachesEveryLayer) {
  MomentumBatchNorm1d outer(3);
  MomentumBatchNorm2d inner(4);
  torch::nn::ModuleList network(outer, torch::nn::ModuleList(inner));
  set_total_iters(*network, 77);
  EXPECT_EQ(outer->total_iters(), 77);
  EXPECT_EQ(inner->total_iters(), 77);
  set_total_iters(*inner, 5);
  EXPECT_EQ(inner->total_iters(), 5);
}

TEST(ShowConfig, NamesTheTorchVersion) { EXPECT_NE(show_config().find("torch"), std::string::npos) << show_config(); }

}  // namespace
}  // namespace momentum_bn
