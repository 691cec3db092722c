#include "oracle.h"
#include "snapshots.h"

#include <gtest/gtest.h>
#include <momentum_bn/functional.h>

namespace momentum_bn {
namespace {

using functional::momentum_batch_norm;
using testing::expect_close;
using testing::randn;
using testing::same_bits;

TEST(Functional, TrainingEqualsTheOracle) {
  for (const std::vector<int64_t>& shape :
       std::vector<std::vector<int64_t>>{{4, 5}, {4, 5, 3}, {3, 5, 4, 2}, {2, 5, 3, 2, 2}}) {
    const at::Tensor x = randn(shape, 0) + 1;
    const at::Tensor mean = randn({5}, 1), var = randn({5}, 2).abs() + 0.1, weight = randn({5}, 3),
                     bias = randn({5}, 4);
    const at::Tensor kept = x.clone(), kept_mean = mean.clone(), kept_var = var.clone();
    for (const Variance variance : {Variance::Published, Variance::Unbiased, Variance::Biased}) {
      for (const double m : {0.0, 0.25, 1.0}) {
        const auto [y, b_mean, b_var] = momentum_batch_norm(x, mean, var, weight, bias, true, m, 1e-3, variance);
        const auto batch = oracle::batch_statistics(x);
        const at::Tensor blended_var = m * oracle::variance_to_normalise(batch, to_word(variance)) + (1 - m) * var;
        expect_close(y, oracle::normalise(x, m * batch.mean + (1 - m) * mean, blended_var, 1e-3, weight, bias), 1e-12);
        expect_close(b_mean, batch.mean, 1e-12);
        expect_close(b_var, batch.var, 1e-12);
      }
    }
    EXPECT_TRUE(same_bits(x, kept) && same_bits(mean, kept_mean) && same_bits(var, kept_var)) << "pure";
  }
}

TEST(Functional, WithoutRunningStatisticsTheBatchAlone) {
  const at::Tensor x = randn({4, 5, 3}, 0);
  const auto batch = oracle::batch_statistics(x);
  const at::Tensor expected = oracle::normalise(x, batch.mean, oracle::variance_to_normalise(batch, "published"), 1e-5);
  expect_close(std::get<0>(momentum_batch_norm(x, {}, {}, {}, {}, true, 0.25)), expected, 1e-12);
  const auto [y, b_mean, b_var] = momentum_batch_norm(x, {}, {});
  expect_close(y, expected, 1e-12);
  EXPECT_EQ(b_mean.numel(), 0);
  EXPECT_EQ(b_var.numel(), 0);
}

TEST(Functional, EvaluationIsTorchsBatchNorm) {
  const at::Tensor x = randn({4, 5, 3}, 0, at::kFloat), mean = randn({5}, 1, at::kFloat), var = at::rand({5}) + 0.1;
  const auto [y, b_mean, b_var] = momentum_batch_norm(x, mean, var);
  EXPECT_TRUE(same_bits(y, at::batch_norm(x, {}, {}, mean, var, false, 0.0, 1e-5, false)));
  EXPECT_EQ(b_mean.numel() + b_var.numel(), 0);
}

TEST(Functional, StatisticsAreDetachedAndFloat32ForSixteenBitInput) {
  const at::Tensor x = randn({4, 5, 3}, 0, at::kBFloat16).requires_grad_();
  const auto [y, b_mean, b_var] = momentum_batch_norm(x, {}, {}, {}, {}, true);
  EXPECT_TRUE(y.requires_grad());
  EXPECT_FALSE(b_mean.requires_grad() || b_var.requires_grad());
  EXPECT_EQ(y.scalar_type(), at::kBFloat16);
  EXPECT_EQ(b_mean.scalar_type(), at::kFloat);
  EXPECT_EQ(b_var.scalar_type(), at::kFloat);
}

TEST(Functional, LargeOffsetInFloat32) {
  const at::Tensor x = (randn({8, 16, 14, 14}, 0) + 1e6).to(at::kFloat);
  const at::Tensor y = std::get<0>(momentum_batch_norm(x, {}, {}, {}, {}, true));
  const at::Tensor expected = oracle::MomentumBatchNorm(16).train_forward(x);
  EXPECT_LE((y.to(at::kDouble) - expected).abs().max().item<double>(), 2e-6);
}

}  // namespace
}  // namespace momentum_bn
