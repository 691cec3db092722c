#include "training/sgd.h"

#include "training/learning_rate.h"
#include "training/loss.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>

#include <cmath>

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

/// LARS by its formulas, in float64, for one parameter.
class LarsOracle {
 public:
  explicit LarsOracle(const at::Tensor& parameter) {
    const at::Tensor flat = parameter.detach().to(at::kDouble).contiguous().flatten();
    weights_.assign(flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + flat.numel());
    velocity_.resize(weights_.size());
    adapted_ = parameter.dim() > 1;
  }

  void step(const at::Tensor& gradient, double rate, double momentum, double decay, double trust) {
    const at::Tensor flat = gradient.to(at::kDouble).contiguous().flatten();
    std::vector<double> change(flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + flat.numel());
    double local_rate = 1;
    if (adapted_) {
      double weight_squares = 0;
      double change_squares = 0;
      for (size_t i = 0; i < change.size(); ++i) {
        change[i] += decay * weights_[i];
        weight_squares += weights_[i] * weights_[i];
        change_squares += change[i] * change[i];
      }
      if (weight_squares > 0 && change_squares > 0) {
        local_rate = trust * std::sqrt(weight_squares) / std::sqrt(change_squares);
      }
    }
    for (size_t i = 0; i < change.size(); ++i) {
      velocity_[i] = momentum * velocity_[i] + local_rate * change[i];
      weights_[i] -= rate * velocity_[i];
    }
  }

  at::Tensor weights() const { return at::tensor(weights_, at::kDouble); }

 private:
  std::vector<double> weights_;
  std::vector<double> velocity_;
  bool adapted_ = false;
};

/// @param first_factor  times the gradients of the first step
void expect_lars(const Net& net, double first_factor) {
  constexpr double kMomentum = 0.9;
  constexpr double kDecay = 0.1;
  constexpr double kTrust = 0.02;
  Sgd optimiser(*net, kMomentum, kDecay, kTrust);
  std::vector<LarsOracle> oracles;
  for (const at::Tensor& parameter : net->parameters()) {
    oracles.emplace_back(parameter);
  }
  double factor = first_factor;
  for (const double rate : {0.1, 0.05, 0.2}) {
    for (size_t i = 0; i < oracles.size(); ++i) {
      const at::Tensor gradient = factor * at::randn_like(net->parameters()[i]);
      oracles[i].step(gradient, rate, kMomentum, kDecay, kTrust);
      net->parameters()[i].mutable_grad() =
          gradient.dim() == 4 ? gradient.contiguous(at::MemoryFormat::ChannelsLast) : gradient;
    }
    factor = 1;
    optimiser.step(rate, 0, 2);
    optimiser.step(rate, 1, 2);
  }
  for (size_t i = 0; i < oracles.size(); ++i) {
    const at::Tensor weights = net->parameters()[i].detach().flatten();
    EXPECT_LT((weights - oracles[i].weights()).abs().max().item<double>(), 1e-6) << "parameter " << i;
  }
}

TEST(Sgd, WithATrustCoefficientIsLars) {
  at::manual_seed(1);
  expect_lars(Net(), 1);
  expect_lars(Net(), 0);
  const Net zero;
  zero->conv->weight.detach().zero_();
  expect_lars(zero, 1);
  zero->conv->weight.detach().zero_();
  expect_lars(zero, 0);
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
