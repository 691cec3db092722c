#include "training/sgd.h"

#include "training/learning_rate.h"
#include "training/loss.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>

namespace m2teacher {
namespace {

struct NetImpl : torch::nn::Module {
  NetImpl() {
    conv = register_module("conv", torch::nn::Conv2d(torch::nn::Conv2dOptions(2, 3, 3)));
    bn = register_module("bn", torch::nn::BatchNorm2d(3));
  }
  torch::nn::Conv2d conv{nullptr};
  torch::nn::BatchNorm2d bn{nullptr};
};
TORCH_MODULE(Net);

TEST(Sgd, FollowsTheTextbookAndDecaysWeightsOnly) {
  at::manual_seed(1);
  constexpr double kMomentum = 0.9;
  constexpr double kDecay = 0.1;
  const Net net;
  Sgd optimiser(*net, kMomentum, kDecay);
  std::vector<at::Tensor> expected;
  std::vector<at::Tensor> velocity;
  for (const at::Tensor& parameter : net->parameters()) {
    expected.push_back(parameter.detach().to(at::kDouble));
    velocity.push_back(at::zeros_like(expected.back()));
  }
  for (const double rate : {0.1, 0.05, 0.2}) {
    for (size_t i = 0; i < expected.size(); ++i) {
      at::Tensor gradient = at::randn_like(net->parameters()[i]);
      const double decay = net->parameters()[i].dim() > 1 ? kDecay : 0;
      velocity[i] = kMomentum * velocity[i] + gradient + decay * expected[i];
      expected[i] = expected[i] - rate * velocity[i];
      // A gradient may come in another memory format than its parameter.
      net->parameters()[i].mutable_grad() =
          gradient.dim() == 4 ? gradient.contiguous(at::MemoryFormat::ChannelsLast) : gradient;
    }
    optimiser.step(rate);
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_LT((net->parameters()[i].detach() - expected[i]).abs().max().item<double>(), 1e-5) << "parameter " << i;
    EXPECT_FALSE(net->parameters()[i].grad().defined());
  }
}

TEST(LearningRate, WarmsUpThenFallsByACosine) {
  EXPECT_DOUBLE_EQ(learning_rate(0, 100, 10, 0.5), 0.05);
  EXPECT_DOUBLE_EQ(learning_rate(9, 100, 10, 0.5), 0.5);
  EXPECT_DOUBLE_EQ(learning_rate(10, 100, 10, 0.5), 0.5);
  EXPECT_DOUBLE_EQ(learning_rate(55, 100, 10, 0.5), 0.25);
  EXPECT_LT(learning_rate(99, 100, 10, 0.5), 0.001);
  EXPECT_GT(learning_rate(99, 100, 10, 0.5), 0);
  EXPECT_DOUBLE_EQ(learning_rate(0, 100, 0, 0.5), 0.5);
}

TEST(CosineLoss, GoesFromZeroToFourAndSparesTheTarget) {
  const at::Tensor p = at::randn({5, 3}).requires_grad_();
  const at::Tensor target = at::randn({5, 3}).requires_grad_();
  EXPECT_NEAR(cosine_loss(p, 2 * p).item<double>(), 0, 1e-5);
  EXPECT_NEAR(cosine_loss(p, -p).item<double>(), 4, 1e-5);
  cosine_loss(p, target).backward();
  EXPECT_TRUE(p.grad().defined());
  EXPECT_FALSE(target.grad().defined());
}

}  // namespace
}  // namespace m2teacher
