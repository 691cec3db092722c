#include "snapshots.h"

#include <gtest/gtest.h>
#include <momentum_bn/functional.h>
#include <momentum_bn/modules.h>
#include <torch/nn/modules/container/modulelist.h>

#include <limits>
#include <string>
#include <typeinfo>
#include <vector>

namespace momentum_bn {
namespace {

using testing::expect_same;
using testing::snapshot;

/// Calls `action`, which must throw exactly `Error`, and returns its words.
template <typename Error, typename Action>
std::string words_of(const Action& action) {
  try {
    action();
  } catch (const Error& error) {
    EXPECT_EQ(typeid(error), typeid(Error));
    return error.what_without_backtrace();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "another type of error: " << error.what();
    return "";
  }
  ADD_FAILURE() << "no error";
  return "";
}

void expect_contains(const std::string& words, const std::vector<std::string>& parts) {
  for (const std::string& part : parts) {
    EXPECT_NE(words.find(part), std::string::npos) << part << " in: " << words;
  }
}

/// A layer in the middle of a half-done update.
MomentumBatchNorm2d mid_pair_layer(MomentumBatchNormOptions options = MomentumBatchNormOptions(3)) {
  MomentumBatchNorm2d layer(options.momentum(0.5));
  for (int i = 0; i < 3; ++i) {
    layer->forward(at::rand({4, 3, 2, 2}));
  }
  return layer;
}

template <typename Error>
std::string refused(MomentumBatchNorm2d layer, const at::Tensor& x, const at::Tensor& residual = {}) {
  std::string words;
  for (const bool training : {true, false}) {
    layer->train(training);
    const auto before = snapshot(layer);
    const at::Tensor kept = x.clone();
    words = words_of<Error>([&] { layer->forward(x, residual); });
    expect_same(snapshot(layer), before);
    EXPECT_TRUE(testing::same_bits(x, kept));
  }
  layer->train();
  return words;
}

TEST(Errors, WrongRank) {
  MomentumBatchNorm2d layer = mid_pair_layer();
  expect_contains(refused<c10::ValueError>(layer, at::rand({4, 3, 2})), {"expected 4D input (got 3D input)"});
  expect_contains(refused<c10::ValueError>(layer, at::rand({3})), {"expected 4D input (got 1D input)"});
  expect_contains(refused<c10::ValueError>(layer, at::rand({})), {"expected 4D input (got 0D input)"});
  expect_contains(refused<c10::ValueError>(layer, at::empty({0, 3})), {"expected 4D input (got 2D input)"});
  expect_contains(words_of<c10::ValueError>([] { MomentumBatchNorm1d(3)->forward(at::rand({4, 3, 2, 2})); }),
                  {"expected 2D or 3D input (got 4D input)"});
  expect_contains(words_of<c10::ValueError>([] { MomentumBatchNorm3d(3)->forward(at::rand({4, 3, 2, 2})); }),
                  {"expected 5D input (got 4D input)"});
}

TEST(Errors, OneValuePerChannel) {
  MomentumBatchNorm2d layer = mid_pair_layer();
  const auto before = snapshot(layer);
  expect_contains(words_of<c10::ValueError>([&] { layer->forward(at::rand({1, 3, 1, 1})); }),
                  {"Expected more than 1 value per channel when training, got input size", "1, 3, 1, 1"});
  expect_same(snapshot(layer), before);
  layer->eval();
  EXPECT_NO_THROW(layer->forward(at::rand({1, 3, 1, 1})));
  MomentumBatchNorm2d untracked(MomentumBatchNormOptions(3).track_running_stats(false));
  expect_contains(refused<c10::ValueError>(untracked, at::rand({1, 3, 1, 1})),
                  {"Expected more than 1 value per channel"});
}

TEST(Errors, WrongNumberOfChannels) {
  expect_contains(refused<c10::ValueError>(mid_pair_layer(), at::rand({4, 5, 2, 2})), {"3", "5"});
}

TEST(Errors, UndefinedInput) {
  MomentumBatchNorm2d layer = mid_pair_layer();
  const auto before = snapshot(layer);
  EXPECT_THROW(layer->forward(at::Tensor()), c10::Error);
  expect_same(snapshot(layer), before);
}

TEST(Errors, IntegerAndComplexInput) {
  for (const auto dtype : {at::kLong, at::kInt, at::kByte, at::kBool, at::kComplexFloat}) {
    refused<c10::TypeError>(mid_pair_layer(), at::ones({4, 3, 2, 2}, dtype));
  }
}

TEST(Errors, Residual) {
  const at::NoGradGuard no_grad;
  for (const bool inplace : {false, true}) {
    MomentumBatchNorm2d layer = mid_pair_layer(MomentumBatchNormOptions(3).inplace(inplace));
    const at::Tensor x = at::rand({4, 3, 2, 2});
    for (const at::Tensor& residual :
         {at::rand({4, 3, 2, 1}), at::rand({1, 3, 2, 2}), at::rand({3, 2, 2}), at::rand({4, 3, 2, 2}, at::kDouble)}) {
      expect_contains(refused<c10::ValueError>(layer, x, residual), {"residual"});
    }
  }
}

TEST(Errors, Options) {
  const auto words = [](const MomentumBatchNormOptions& options) {
    return words_of<c10::ValueError>([&] { MomentumBatchNorm2d layer(options); });
  };
  MomentumBatchNormOptions good(3);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  expect_contains(words(MomentumBatchNormOptions(good).total_iters(0)), {"total_iters", "0"});
  expect_contains(words(MomentumBatchNormOptions(good).momentum(1.5)), {"momentum", "1.5"});
  expect_contains(words(MomentumBatchNormOptions(good).momentum(-0.5)), {"momentum", "-0.5"});
  expect_contains(words(MomentumBatchNormOptions(good).momentum(nan)), {"momentum"});
  expect_contains(words(MomentumBatchNormOptions(good).eps(0)), {"eps"});
  expect_contains(words(MomentumBatchNormOptions(good).eps(nan)), {"eps"});
  expect_contains(words(MomentumBatchNormOptions(good).eps(std::numeric_limits<double>::infinity())),
                  {"eps must be positive and finite (got inf)"});
  expect_contains(words(MomentumBatchNormOptions(good).views_per_update(0)), {"views_per_update", "0"});
  expect_contains(words(MomentumBatchNormOptions(good).process_group("world")), {"process_group", "'world'"});
}

TEST(Errors, Assignments) {
  for (const bool tracking : {true, false}) {
    MomentumBatchNorm2d layer = mid_pair_layer(MomentumBatchNormOptions(3).track_running_stats(tracking));
    const auto before = snapshot(layer);
    expect_contains(words_of<c10::ValueError>([&] { layer->set_momentum(1.5); }), {"momentum", "1.5"});
    expect_contains(words_of<c10::ValueError>([&] { layer->set_total_iters(0); }), {"total_iters"});
    expect_contains(words_of<c10::ValueError>([&] { layer->set_cur_iter(-1); }), {"cur_iter", "-1"});
    torch::nn::ModuleList network(layer);
    expect_contains(words_of<c10::ValueError>([&] { set_total_iters(*network, 0); }), {"total_iters"});
    expect_same(snapshot(layer), before);
  }
}

TEST(Errors, Function) {
  using functional::momentum_batch_norm;
  const at::Tensor x = at::rand({4, 3}), ones = at::ones({3});
  for (const bool training : {true, false}) {
    expect_contains(words_of<c10::ValueError>([&] { momentum_batch_norm(x, at::ones({4}), ones, {}, {}, training); }),
                    {"running_mean"});
    expect_contains(words_of<c10::ValueError>([&] { momentum_batch_norm(x, ones, at::ones({4}), {}, {}, training); }),
                    {"running_var"});
    expect_contains(words_of<c10::ValueError>([&] { momentum_batch_norm(x, ones, ones, at::ones({4}), {}, training); }),
                    {"weight"});
    expect_contains(words_of<c10::ValueError>([&] { momentum_batch_norm(x, ones, ones, {}, at::ones({4}), training); }),
                    {"bias"});
    expect_contains(words_of<c10::ValueError>([&] { momentum_batch_norm(x, ones, {}, {}, {}, training); }),
                    {"running_"});
    expect_contains(
        words_of<c10::ValueError>([&] { momentum_batch_norm(at::rand({3}), ones, ones, {}, {}, training); }), {"2D"});
    words_of<c10::TypeError>([&] { momentum_batch_norm(at::ones({4, 3}, at::kLong), ones, ones, {}, {}, training); });
  }
  expect_contains(words_of<c10::ValueError>([&] { momentum_batch_norm(x, ones, ones, {}, {}, true, 1.5); }),
                  {"momentum"});
  expect_contains(words_of<c10::ValueError>([&] { momentum_batch_norm(x, ones, ones, {}, {}, true, 1.0, 0.0); }),
                  {"eps"});
  expect_contains(words_of<c10::ValueError>([&] { momentum_batch_norm(at::rand({1, 3}), ones, ones, {}, {}, true); }),
                  {"Expected more than 1 value per channel when training"});
}

TEST(Errors, MixtureOfDtypesIsTorchs) {
  MomentumBatchNorm2d layer = mid_pair_layer(MomentumBatchNormOptions(3));
  refused<c10::Error>(layer, at::rand({4, 3, 2, 2}, at::kDouble));
}

}  // namespace
}  // namespace momentum_bn
