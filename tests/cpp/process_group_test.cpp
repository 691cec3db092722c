// Statistics over several processes, here threads. With Gloo: tests/python/test_process_group.py.

#include "oracle.h"
#include "snapshots.h"

#include <gtest/gtest.h>
#include <momentum_bn/modules.h>

#ifdef USE_DISTRIBUTED  // as torch itself was compiled
#include "thread_ranks.h"

#include <numeric>

namespace momentum_bn {
namespace {

using testing::expect_close;
using testing::expect_same;
using testing::randn;
using testing::run_on_ranks;
using testing::same_bits;
using testing::snapshot;
using testing::ThreadRank;

constexpr double kExact = 1e-10;
constexpr int kSteps = 4;  // two updates of two views

/// What all ranks have together in a step: input (0) or gradient of the output (1).
at::Tensor whole_batch(int64_t size, int step, int kind) {
  static std::mutex one_generator;
  const std::lock_guard lock(one_generator);
  return randn({size, 3, 4, 5}, static_cast<uint64_t>(10 * step + kind)) * (1 + step) + (kind == 0 ? 3 : 0);
}

at::Tensor shard_of(const at::Tensor& whole, const std::vector<int64_t>& shards, int rank) {
  return whole.split_with_sizes(shards)[static_cast<size_t>(rank)].clone();
}

MomentumBatchNorm2d layer_of(const std::optional<std::string>& group) {
  const auto options =
      MomentumBatchNormOptions(3).total_iters(4).activation(Activation::ReLU).dtype(at::kDouble).process_group(group);
  MomentumBatchNorm2d layer(options);
  at::NoGradGuard no_grad;
  layer->weight.copy_(at::linspace(0.5, 1.5, 3, at::kDouble));
  layer->bias.copy_(at::linspace(-0.5, 0.5, 3, at::kDouble));
  return layer;
}

struct RankResult {
  std::vector<at::Tensor> outputs;
  std::vector<at::Tensor> gradients;
  testing::Snapshot state;
  at::Tensor dweight;
};

RankResult train(const ThreadRank& rank, const std::vector<int64_t>& shards, int64_t size) {
  auto layer = layer_of(rank.group);
  RankResult result;
  for (int step = 0; step < kSteps; ++step) {
    const auto x = shard_of(whole_batch(size, step, 0), shards, rank.rank).requires_grad_();
    const auto y = layer->forward(x);
    EXPECT_EQ(rank.backend.collectives, step + 1) << "one collective per forward";
    y.backward(shard_of(whole_batch(size, step, 1), shards, rank.rank));
    EXPECT_EQ(rank.backend.collectives, step + 1) << "none in the backward pass";
    result.outputs.push_back(y.detach());
    result.gradients.push_back(x.grad());
  }
  result.dweight = layer->weight.grad();
  result.state = snapshot(layer);
  return result;
}

void expect_one_process(const std::vector<int64_t>& shards) {
  const int64_t size = std::accumulate(shards.begin(), shards.end(), int64_t{0});
  std::vector<RankResult> results(shards.size());
  run_on_ranks(static_cast<int>(shards.size()),
               [&](const ThreadRank& rank) { results[static_cast<size_t>(rank.rank)] = train(rank, shards, size); });

  oracle::MomentumBatchNorm reference(3);
  reference.total_iters = 4;
  reference.relu = true;
  const auto layer = layer_of(std::nullopt);
  at::Tensor dweight = at::zeros({3}, at::kDouble);
  for (int step = 0; step < kSteps; ++step) {
    const auto x = whole_batch(size, step, 0).requires_grad_();
    const auto expected = reference.train_forward(x, layer->weight, layer->bias);
    expected.backward(whole_batch(size, step, 1));
    std::vector<at::Tensor> outputs;
    std::vector<at::Tensor> gradients;
    for (const auto& result : results) {
      outputs.push_back(result.outputs[static_cast<size_t>(step)]);
      gradients.push_back(result.gradients[static_cast<size_t>(step)]);
    }
    expect_close(at::cat(outputs), expected, kExact, "y");
    expect_close(at::cat(gradients), x.grad(), kExact, "dx");
  }
  for (const auto& result : results) {
    dweight += result.dweight;
    expect_same(result.state, results[0].state);
  }
  expect_close(dweight, layer->weight.grad(), kExact, "sum of the ranks' dweight");
  expect_close(results[0].state.tensors.at("running_mean"), reference.running_mean, kExact, "running_mean");
  expect_close(results[0].state.tensors.at("running_var"), reference.running_var, kExact, "running_var");
  EXPECT_EQ(results[0].state.cur_iter, 2);
}

TEST(ProcessGroup, RanksEqualOneProcess) {
  expect_one_process({5, 3});
  expect_one_process({3, 0, 5});
  expect_one_process({1, 1, 1, 5});
}

TEST(ProcessGroup, OneValueInTheWholeGroupIsRefusedOnEveryRank) {
  run_on_ranks(3, [](const ThreadRank& rank) {
    auto layer = layer_of(rank.group);
    const auto before = snapshot(layer);
    EXPECT_THROW(layer->forward(at::rand({rank.rank == 1 ? 1 : 0, 3, 1, 1}, at::kDouble)), c10::ValueError);
    expect_same(snapshot(layer), before);
    EXPECT_EQ(layer->forward(at::empty({0, 3, 2, 2}, at::kDouble)).numel(), 0);
    expect_same(snapshot(layer), before);
    EXPECT_NO_THROW(layer->forward(at::rand({1, 3, 1, 1}, at::kDouble)));
  });
}

TEST(ProcessGroup, EvaluationAsksNobody) {
  run_on_ranks(2, [](const ThreadRank& rank) {
    auto layer = layer_of(rank.group);
    layer->eval();
    layer->forward(at::rand({2, 3, 2, 2}, at::kDouble));
    EXPECT_EQ(rank.backend.collectives, 0);
  });
}

TEST(ProcessGroup, ClonesBelongToTheSameGroup) {
  run_on_ranks(2, [](const ThreadRank& rank) {
    auto layer = layer_of(rank.group);
    layer->forward(at::full({1, 3, 1, 1}, static_cast<double>(rank.rank), at::kDouble));
    const auto clone = std::dynamic_pointer_cast<MomentumBatchNorm2dImpl>(layer->clone());
    const auto x = at::full({1, 3, 1, 1}, static_cast<double>(rank.rank), at::kDouble);
    const auto expected = layer->forward(x);
    EXPECT_TRUE(same_bits(clone->forward(x), expected));
    EXPECT_EQ(rank.backend.collectives, 3);
    EXPECT_EQ(clone->cur_iter(), 1);
  });
}

}  // namespace
}  // namespace momentum_bn

#else

TEST(ProcessGroup, RanksEqualOneProcess) { GTEST_SKIP() << "this build of torch has no torch.distributed"; }

#endif
