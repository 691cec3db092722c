// Several threads at once. Also run under ThreadSanitizer, which does not see into torch: no two threads hold a tensor
// that one of them writes.

#include "snapshots.h"

#include <gtest/gtest.h>
#include <momentum_bn/batch_norm.h>
#include <momentum_bn/memory.h>
#include <momentum_bn/modules.h>
#include <torch/csrc/autograd/autograd.h>

#include <atomic>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace momentum_bn {
namespace {

using testing::expect_same;
using testing::randomise_parameters;
using testing::same_bits;
using testing::snapshot;

constexpr size_t kThreads = 4;

/// Calls work(0) to work(kThreads - 1), each in a thread of its own.
void at_once(const std::function<void(size_t)>& work) {
  std::vector<std::thread> threads;
  for (size_t i = 0; i < kThreads; ++i) {
    threads.emplace_back(work, i);
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

/// Values that depend on the seed alone; torch's own generator is one for all threads.
at::Tensor values(at::IntArrayRef shape, size_t seed) {
  at::Tensor x = at::empty(shape);
  for (int64_t i = 0; i < x.numel(); ++i) {
    x.data_ptr<float>()[i] = static_cast<float>((static_cast<size_t>(i) + 1) * (2 * seed + 7919) % 1009) / 500 - 1;
  }
  return x;
}

template <typename Layer>
std::vector<at::Tensor> run(Layer layer, size_t seed) {
  std::vector<at::Tensor> results;
  for (size_t step = 0; step < 20; ++step) {
    const at::Tensor x = values({4, 8, 5, 5}, 100 * seed + step).requires_grad_();
    const at::Tensor y = layer->forward(x);
    results.push_back(y.detach());
    const std::vector<at::Tensor> gradients =
        torch::autograd::grad({y}, {x, layer->weight, layer->bias}, {values({4, 8, 5, 5}, seed + 50)});
    results.insert(results.end(), gradients.begin(), gradients.end());
  }
  return results;
}

void expect_same_bits(const std::vector<at::Tensor>& actual, const std::vector<at::Tensor>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    EXPECT_TRUE(same_bits(actual[i], expected[i])) << i;
  }
}

template <typename Layer, typename Options>
void check_layers_of_their_own(const Options& options) {
  std::vector<Layer> together;
  std::vector<std::vector<at::Tensor>> results(kThreads);
  for (size_t i = 0; i < kThreads; ++i) {
    together.push_back(randomise_parameters(Layer(options)));
  }
  at_once([&](size_t i) { results[i] = run(together[i], i); });
  for (size_t i = 0; i < kThreads; ++i) {
    Layer alone = randomise_parameters(Layer(options));
    expect_same_bits(results[i], run(alone, i));
    expect_same(snapshot(together[i]), snapshot(alone));
  }
}

TEST(Threads, LayersOfDifferentThreadsAreIndependent) {
  check_layers_of_their_own<MomentumBatchNorm2d>(MomentumBatchNormOptions(8).activation(Activation::ReLU));
  check_layers_of_their_own<MomentumBatchNorm2d>(MomentumBatchNormOptions(8).detach_statistics(false));
}

TEST(Threads, OneLayerIsEvaluatedBySeveral) {
  MomentumBatchNorm2d layer = randomise_parameters(MomentumBatchNorm2d(MomentumBatchNormOptions(8)));
  run(layer, 0);
  layer->eval();
  const auto before = snapshot(layer);
  std::vector<std::vector<at::Tensor>> results(kThreads);
  at_once([&](size_t i) { results[i] = run(layer, i); });
  for (size_t i = 0; i < kThreads; ++i) {
    expect_same_bits(results[i], run(layer, i));
  }
  expect_same(snapshot(layer), before);
}

/// Hands tensors from thread to thread.
class Shelf {
 public:
  /// Leaves y here and takes what was here.
  at::Tensor swap(at::Tensor y) {
    const std::lock_guard lock(mutex_);
    return std::exchange(kept_, std::move(y));
  }

 private:
  std::mutex mutex_;
  at::Tensor kept_;
};

TEST(Threads, KeptMemoryHasOneOwnerAtATime) {
  constexpr int64_t kBytes = int64_t{1} << 25;
  const int64_t limit = kept_memory_limit();
  release_kept_memory();
  Shelf shelf;
  std::atomic<size_t> busy{kThreads - 1};
  at_once([&](size_t i) {
    const at::NoGradGuard no_grad;
    if (i == kThreads - 1) {
      for (int64_t round = 0; busy > 0; ++round) {
        set_kept_memory_limit(round % 4 * kBytes);
        EXPECT_LE(kept_memory(), 3 * kBytes);
        if (round % 5 == 0) {
          release_kept_memory();
        }
        std::this_thread::yield();
      }
      return;
    }
    // One value per thread in float64: evaluation would leave through torch, and training knows what it makes of it.
    BatchNorm2d layer(BatchNormOptions(1).dtype(at::kDouble));
    layer->bias.fill_(static_cast<double>(i));
    const at::Tensor x = at::zeros({1, 1, kBytes / 8, 1}, at::kDouble);
    for (int round = 0; round < 12; ++round) {
      const at::Tensor y = layer->forward(x);
      const double* const data = y.const_data_ptr<double>();
      EXPECT_EQ(data[0], static_cast<double>(i));
      EXPECT_EQ(data[y.numel() - 1], static_cast<double>(i));
      shelf.swap(y);
    }
    --busy;
  });
  shelf.swap({});
  release_kept_memory();
  EXPECT_EQ(kept_memory(), 0);
  set_kept_memory_limit(limit);
}

}  // namespace
}  // namespace momentum_bn
