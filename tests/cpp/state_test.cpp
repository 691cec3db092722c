#include "oracle.h"
#include "snapshots.h"

#include <gtest/gtest.h>
#include <momentum_bn/modules.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/linear.h>
#include <torch/serialize.h>

#include <array>
#include <functional>
#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace momentum_bn {
namespace {

using testing::expect_same;
using testing::randn;
using testing::randomise_parameters;
using testing::same_bits;
using testing::snapshot;

at::Tensor input(int64_t step, at::ScalarType dtype = at::kFloat) {
  return randn({4, 3, 5, 5}, step, dtype) + step % 3;
}

MomentumBatchNorm2d build(const MomentumBatchNormOptions& options) {
  return randomise_parameters(MomentumBatchNorm2d(options));
}

std::vector<MomentumBatchNormOptions> option_cases() {
  return {MomentumBatchNormOptions(3).total_iters(6),
          MomentumBatchNormOptions(3).total_iters(6).views_per_update(3).variance(Variance::Biased),
          MomentumBatchNormOptions(3).momentum(std::nullopt),
          MomentumBatchNormOptions(3).schedule(Schedule::Constant).momentum(0.4),
          MomentumBatchNormOptions(3).total_iters(2).dtype(at::kDouble)};
}

MomentumBatchNorm2d saved_and_loaded(MomentumBatchNorm2d layer, const MomentumBatchNormOptions& options) {
  std::stringstream stream;
  torch::save(layer, stream);
  MomentumBatchNorm2d fresh(options);
  torch::load(fresh, stream);
  return fresh;
}

MomentumBatchNorm2d cloned(MomentumBatchNorm2d layer, const MomentumBatchNormOptions&) {
  return MomentumBatchNorm2d(std::dynamic_pointer_cast<MomentumBatchNorm2dImpl>(layer->clone()));
}

TEST(State, CutRunGoesOnBitForBit) {
  for (const auto& options : option_cases()) {
    const auto dtype = options.dtype().value_or(at::kFloat);
    for (const auto& cut : {saved_and_loaded, cloned}) {
      for (const int64_t forwards : {0, 1, 2, 3, 7}) {
        MomentumBatchNorm2d uncut = build(options);
        for (int64_t step = 0; step < forwards; ++step) {
          uncut->forward(input(step, dtype));
        }
        MomentumBatchNorm2d resumed = cut(uncut, options);
        expect_same(snapshot(resumed), snapshot(uncut));
        const auto before = snapshot(uncut);
        std::vector<at::Tensor> outputs;
        for (int64_t step = forwards; step < forwards + 8; ++step) {
          outputs.push_back(resumed->forward(input(step, dtype)));
        }
        expect_same(snapshot(uncut), before);  // they share nothing
        for (int64_t step = forwards; step < forwards + 8; ++step) {
          EXPECT_TRUE(same_bits(uncut->forward(input(step, dtype)), outputs[step - forwards]))
              << forwards << " " << step;
        }
        expect_same(snapshot(resumed), snapshot(uncut));
      }
    }
  }
}

TEST(State, CloneKeepsTheConfiguration) {
  const auto options = MomentumBatchNormOptions(3)
                           .eps(1e-3)
                           .views_per_update(3)
                           .total_iters(9)
                           .activation(Activation::ReLU)
                           .inplace(true);
  MomentumBatchNorm2d copy = cloned(MomentumBatchNorm2d(options), options);
  EXPECT_EQ(copy->options.eps(), 1e-3);
  EXPECT_EQ(copy->options.views_per_update(), 3);
  EXPECT_EQ(copy->total_iters(), 9);
  EXPECT_EQ(copy->options.activation(), Activation::ReLU);
  EXPECT_TRUE(copy->options.inplace());
}

TEST(State, CastsNeverRoundScheduleOrCounters) {
  const std::vector<std::function<void(torch::nn::Module&)>> casts = {
      [](auto& m) { m.to(at::kHalf), m.to(at::kFloat); },
      [](auto& m) { m.to(at::kBFloat16), m.to(at::kFloat); },
      [](auto& m) { m.to(at::kCPU, at::kHalf), m.to(at::kCPU, at::kFloat); },
  };
  for (const auto& cast : casts) {
    for (const bool nested : {false, true}) {
      MomentumBatchNorm2d layer(MomentumBatchNormOptions(3).total_iters(1001));
      layer->set_cur_iter(54321);  // not a number of float16 or bfloat16
      layer->set_momentum(0.1);
      for (int64_t step = 0; step < 3; ++step) {
        layer->forward(input(step));
      }
      layer->set_momentum(0.1);
      if (nested) {
        torch::nn::ModuleList network(layer);
        cast(*network);
      } else {
        cast(*layer);
      }
      EXPECT_EQ(layer->running_mean.scalar_type(), at::kFloat);
      EXPECT_EQ(layer->weight.scalar_type(), at::kFloat);
      EXPECT_EQ(layer->momentum_state.scalar_type(), at::kDouble);
      EXPECT_EQ(layer->cur_iter_state.scalar_type(), at::kLong);
      EXPECT_EQ(layer->num_batches_tracked.scalar_type(), at::kLong);
      EXPECT_EQ(layer->view_count.scalar_type(), at::kLong);
      EXPECT_EQ(layer->momentum(), 0.1);
      EXPECT_EQ(layer->cur_iter(), 54322);
      EXPECT_EQ(layer->num_batches_tracked.item<int64_t>(), 3);
      EXPECT_EQ(layer->view_count.item<int64_t>(), 1);
      layer->forward(input(3));
      EXPECT_EQ(layer->cur_iter(), 54323);
      EXPECT_EQ(layer->num_batches_tracked.item<int64_t>(), 4);
    }
  }
}

TEST(State, SumsOfTheViewsHaveFloat32AtLeast) {
  for (const auto dtype : {at::kHalf, at::kBFloat16}) {
    const auto options = MomentumBatchNormOptions(2).views_per_update(8);
    MomentumBatchNorm1d cast(options);
    cast->to(dtype);
    MomentumBatchNorm1d constructed(MomentumBatchNormOptions(options).dtype(dtype));
    for (MomentumBatchNorm1d layer : {cast, constructed}) {
      std::vector<at::Tensor> variances;
      const auto view = [&](uint64_t seed) { return (randn({64, 2}, seed) * 100).to(dtype); };
      for (uint64_t seed = 0; seed < 7; ++seed) {
        layer->forward(view(seed));
      }
      EXPECT_EQ(layer->view_mean_sum.scalar_type(), at::kFloat);
      EXPECT_EQ(layer->view_var_sum.scalar_type(), at::kFloat);
      const at::Tensor sums = layer->view_var_sum.clone();
      layer->to(at::kFloat), layer->to(at::kBFloat16), layer->to(at::kCPU, dtype);
      EXPECT_TRUE(same_bits(layer->view_var_sum, sums)) << "a cast leaves them as they are";

      std::stringstream stream;
      torch::save(layer, stream);
      MomentumBatchNorm1d loaded(options);
      torch::load(loaded, stream);
      MomentumBatchNorm1d copy(std::dynamic_pointer_cast<MomentumBatchNorm1dImpl>(layer->clone()));
      for (uint64_t seed = 0; seed < 8; ++seed) {
        variances.push_back(view(seed).to(at::kDouble).var({0}));
      }
      const at::Tensor expected = at::stack(variances).mean({0}) * 64 / 63;
      for (MomentumBatchNorm1d complete : {layer, loaded, copy}) {
        EXPECT_EQ(complete->view_var_sum.scalar_type(), at::kFloat);
        complete->forward(view(7));
        const at::Tensor error = (complete->running_var.to(at::kDouble) / expected - 1).abs().max();
        EXPECT_LT(error.item<double>(), dtype == at::kHalf ? 0x1p-10 : 0x1p-7);
      }
    }
  }
  MomentumBatchNorm1d layer(2);
  layer->to(at::kDouble);
  EXPECT_EQ(layer->view_mean_sum.scalar_type(), at::kDouble);
}

TEST(State, SumsSavedInSixteenBitsAreWidened) {
  MomentumBatchNorm1d layer(2);
  layer->to(at::kHalf);
  torch::serialize::OutputArchive archive;
  for (const auto& item : layer->named_parameters()) {
    archive.write(item.key(), item.value());
  }
  for (const auto& item : layer->named_buffers()) {
    const bool is_sum = item.key().rfind("view_", 0) == 0 && item->dim() == 1;
    archive.write(item.key(), is_sum ? item->to(at::kHalf) : item.value(), /*is_buffer=*/true);
  }
  std::stringstream stream;
  archive.save_to(stream);
  torch::load(layer, stream);
  EXPECT_EQ(layer->view_mean_sum.scalar_type(), at::kFloat);
  EXPECT_EQ(layer->view_var_sum.scalar_type(), at::kFloat);
}

TEST(State, HalfLayerRunsOnHalfInput) {
  MomentumBatchNorm2d layer(3);
  layer->to(at::kBFloat16);
  EXPECT_EQ(layer->running_mean.scalar_type(), at::kBFloat16);
  EXPECT_EQ(layer->forward(input(0, at::kBFloat16)).scalar_type(), at::kBFloat16);
}

TEST(State, ArchiveOfAPlainBatchNormLoads) {
  torch::nn::BatchNorm2d plain(3);
  plain->forward(input(0));
  std::stringstream stream;
  torch::save(plain, stream);
  MomentumBatchNorm2d layer(MomentumBatchNormOptions(3).total_iters(10));
  for (int64_t step = 0; step < 3; ++step) {
    layer->forward(input(step));
  }
  const auto momentum = layer->momentum();
  torch::load(layer, stream);
  EXPECT_TRUE(same_bits(layer->running_mean, plain->running_mean));
  EXPECT_TRUE(same_bits(layer->running_var, plain->running_var));
  EXPECT_TRUE(same_bits(layer->num_batches_tracked, plain->num_batches_tracked));
  EXPECT_EQ(layer->momentum(), momentum) << "the schedule stays where it is";
  EXPECT_EQ(layer->cur_iter(), 1);
  EXPECT_EQ(layer->view_count.item<int64_t>(), 0) << "remembered views are dropped";
  EXPECT_TRUE(layer->view_mean_sum.equal(at::zeros({3})));
  EXPECT_TRUE(layer->view_var_sum.equal(at::zeros({3})));
}

TEST(State, ArchiveWithSomeOfOurKeysIsAnErrorThatChangesNothing) {
  for (const std::string missing :
       {"view_mean_sum", "view_var_sum", "view_count", "cur_iter_state", "momentum_state"}) {
    MomentumBatchNorm2d whole(3);
    torch::serialize::OutputArchive archive;
    for (const auto& item : whole->named_parameters()) {
      archive.write(item.key(), item.value());
    }
    for (const auto& item : whole->named_buffers()) {
      if (item.key() != missing) {
        archive.write(item.key(), item.value() + 1, /*is_buffer=*/true);
      }
    }
    std::stringstream stream;
    archive.save_to(stream);
    MomentumBatchNorm2d layer(3);
    layer->forward(input(0));
    const auto before = snapshot(layer);
    EXPECT_THROW(torch::load(layer, stream), c10::Error) << missing;
    expect_same(snapshot(layer), before);
  }
}

TEST(State, ResetMakesAllOfItNew) {
  const auto options = MomentumBatchNormOptions(3).momentum(0.3).total_iters(5);
  MomentumBatchNorm2d layer = build(options);
  for (int64_t step = 0; step < 5; ++step) {
    layer->forward(input(step));
  }
  layer->set_momentum(0.9);
  const at::Tensor weight = layer->weight.detach().clone();
  layer->reset_running_stats();
  EXPECT_TRUE(same_bits(layer->weight, weight));
  layer->reset_parameters();
  expect_same(snapshot(layer), snapshot(MomentumBatchNorm2d(options)));
}

TEST(State, PlainStateDictHasTheKeysOfTorchsNetwork) {
  const auto network = [](auto norm) {
    return torch::nn::ModuleList(torch::nn::Linear(4, 3), norm, torch::nn::ModuleList(torch::nn::Linear(3, 3)));
  };
  MomentumBatchNorm1d layer(3);
  const auto ours = network(layer);
  const auto theirs = network(torch::nn::BatchNorm1d(3));
  layer->forward(at::rand({4, 3}));
  std::vector<std::string> expected;
  for (const auto& item : theirs->named_parameters()) {
    expected.push_back(item.key());
  }
  for (const auto& item : theirs->named_buffers()) {
    expected.push_back(item.key());
  }
  std::vector<std::string> keys = plain_state_dict(*ours).keys();
  EXPECT_EQ(std::set<std::string>(keys.begin(), keys.end()), std::set<std::string>(expected.begin(), expected.end()));
  EXPECT_TRUE(same_bits(plain_state_dict(*ours)["1.running_mean"], layer->running_mean));
  EXPECT_EQ(plain_state_dict(*layer).size(), 5U);
}

TEST(State, ScheduleStaysAtZeroPastTotalIters) {
  MomentumBatchNorm2d layer(MomentumBatchNormOptions(3).total_iters(4).views_per_update(1));
  for (int64_t step = 0; step < 10; ++step) {
    layer->forward(input(step));
    EXPECT_NEAR(*layer->momentum(), oracle::cosine_schedule(step + 1, 4), 1e-15);
  }
  EXPECT_EQ(layer->momentum(), 0.0);
}

}  // namespace
}  // namespace momentum_bn
