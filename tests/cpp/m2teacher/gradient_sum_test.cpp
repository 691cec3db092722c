#include "training/gradient_sum.h"

#ifdef USE_DISTRIBUTED  // as torch itself was compiled
#include "thread_ranks.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/container/parameterlist.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>

#include <barrier>
#include <thread>

namespace m2teacher {
namespace {

using momentum_bn::testing::run_on_ranks;
using momentum_bn::testing::ThreadRank;

constexpr int kRanks = 3;

/// Parameters of several sizes and layouts, each of which has a gradient that one can tell.
struct NetworkImpl : torch::nn::Module {
  NetworkImpl() {
    conv->weight.set_data(conv->weight.contiguous(at::MemoryFormat::ChannelsLast));
    register_module("conv", conv);
    register_module("linear", linear);
  }
  /// Values of the gradients: 1, 2, 3, ... times `factor`, in the order of the parameters.
  at::Tensor loss(double factor) {
    at::Tensor sum = at::zeros({});
    int64_t first = 1;
    for (const at::Tensor& parameter : parameters()) {
      sum = sum + (parameter * gradient(parameter, first) * factor).sum();
      first += parameter.numel();
    }
    return sum;
  }
  static at::Tensor gradient(const at::Tensor& parameter, int64_t first) {
    return at::arange(first, first + parameter.numel()).to(at::kFloat).view(parameter.sizes());
  }

  torch::nn::Conv2d conv{torch::nn::Conv2dOptions(3, 4, 2).bias(false)};
  torch::nn::Linear linear{5, 6};
};
TORCH_MODULE(Network);

void expect_sums(const ThreadRank& rank, int64_t bucket_bytes, int64_t buckets) {
  Network network;
  GradientSum sum(*network, Ranks(rank.group), /*passes=*/2, /*batches=*/1, bucket_bytes);
  for (int step = 1; step <= 2; ++step) {
    const int64_t before = rank.backend.collectives;
    const double factor = step * (1 + rank.rank);
    network->loss(factor).backward();
    EXPECT_EQ(rank.backend.collectives, before) << "the first pass leaves gradients half done";
    network->loss(10 * factor).backward();
    EXPECT_EQ(rank.backend.collectives, before + buckets) << "the second sends them";
    sum.finish();
    EXPECT_EQ(rank.backend.collectives, before + buckets);
    int64_t first = 1;
    for (at::Tensor& parameter : network->parameters()) {
      const at::Tensor expected = NetworkImpl::gradient(parameter, first) * (step * 11 * (1 + 2 + 3));
      EXPECT_TRUE(at::allclose(parameter.grad(), expected, 1e-5)) << parameter.sizes();
      EXPECT_EQ(parameter.grad().strides(), parameter.strides());
      first += parameter.numel();
      parameter.mutable_grad().reset();
    }
  }
}

TEST(GradientSum, IsThatOfAllRanksInBuckets) {
  // Bytes: convolution 192, weight 120, bias 24; from the last one on.
  run_on_ranks(kRanks, [](const ThreadRank& rank) { expect_sums(rank, GradientSum::kBucketBytes, 1); });
  run_on_ranks(kRanks, [](const ThreadRank& rank) { expect_sums(rank, 144, 2); });
  run_on_ranks(kRanks, [](const ThreadRank& rank) { expect_sums(rank, 1, 3); });
}

TEST(GradientSum, IsThatOfAllBatchesOfAStep) {
  run_on_ranks(kRanks, [](const ThreadRank& rank) {
    Network network;
    GradientSum sum(*network, Ranks(rank.group), /*passes=*/2, /*batches=*/3);
    for (int step = 1; step <= 2; ++step) {
      const int64_t before = rank.backend.collectives;
      for (const double factor : {1.0, 10.0, 100.0}) {
        EXPECT_EQ(rank.backend.collectives, before) << "the last batch alone is sent";
        network->loss(factor).backward();
        network->loss(factor).backward();
      }
      EXPECT_EQ(rank.backend.collectives, before + 1);
      sum.finish();
      int64_t first = 1;
      for (at::Tensor& parameter : network->parameters()) {
        const at::Tensor expected = NetworkImpl::gradient(parameter, first) * (2 * 111 * kRanks);
        EXPECT_TRUE(at::allclose(parameter.grad(), expected, 1e-5)) << parameter.sizes();
        first += parameter.numel();
        parameter.mutable_grad().reset();
      }
    }
  });
}

/// Two passes often end at a parameter in the same moment: one waits there until the other has added its gradient.
TEST(GradientSum, TakesPassesOfTwoThreadsAtOnce) {
  constexpr int kSteps = 200;
  constexpr int kPasses = 2;
  torch::nn::ParameterList parameters;
  for (int i = 0; i < 50; ++i) {
    parameters->append(at::zeros({2000}).requires_grad_());
  }
  GradientSum sum(*parameters, Ranks(), kPasses, /*batches=*/2);
  std::barrier together(kPasses);
  for (int step = 0; step < kSteps; ++step) {
    const auto pass = [&](double factor) {
      const at::Tensor loss = at::cat(parameters->parameters()).sum() * factor;
      together.arrive_and_wait();
      loss.backward();
    };
    for (int batch = 0; batch < 2; ++batch) {
      std::thread other(pass, 1);
      pass(10);
      other.join();
    }
    sum.finish();
    for (at::Tensor& parameter : parameters->parameters()) {
      ASSERT_TRUE(parameter.grad().eq(22).all().item<bool>());
      parameter.mutable_grad().reset();
    }
  }
}

TEST(GradientSum, MissesAParameterWithoutGradient) {
  run_on_ranks(kRanks, [](const ThreadRank& rank) {
    Network network;
    GradientSum sum(*network, Ranks(rank.group), /*passes=*/1);
    network->linear->weight.sum().backward();
    EXPECT_THROW(sum.finish(), std::logic_error);
  });
}

}  // namespace
}  // namespace m2teacher
#endif
