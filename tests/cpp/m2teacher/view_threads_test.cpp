#include "training/view_threads.h"

#include "models/view_order.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace m2teacher {
namespace {

/// Torch's number of threads for the test, and for those after it as before.
class ViewThreadsTest : public testing::Test {
 protected:
  void SetUp() override { at::set_num_threads(4); }
  void TearDown() override { at::set_num_threads(before_); }
  int before_ = at::get_num_threads();
};

/// Writes down which views passed, in order; the first takes its time.
struct Recorder : Norm {
  explicit Recorder(std::vector<int64_t>& record) : views(record) {}
  at::Tensor forward(const at::Tensor& x, const at::Tensor& /*residual*/) override {
    const int64_t view = ViewOrder::of_this_thread().view;
    if (view == 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    views.push_back(view);
    return x;
  }
  std::vector<int64_t>& views;
};

std::unique_ptr<Norm> ordered(std::vector<int64_t>& record) {
  const NormFactory factory = in_view_order([&record](torch::nn::Module&, const std::string&, const NormOptions&) {
    return std::make_unique<Recorder>(record);
  });
  torch::nn::Module parent;
  return factory(parent, "bn", {.channels = 1, .spatial = false, .relu = false});
}

TEST_F(ViewThreadsTest, RunsBothViewsSideBySideWithHalfOfTheThreadsEach) {
  ViewThreads threads;
  for (int again = 0; again < 3; ++again) {
    std::array<std::thread::id, 2> ids;
    std::array<int, 2> counts{};
    std::atomic<int> inside{0};
    threads.run([&](int64_t view) {
      ids.at(view) = std::this_thread::get_id();
      counts.at(view) = at::get_num_threads();
      ++inside;
      while (inside < 2) {
        std::this_thread::yield();
      }
    });
    EXPECT_EQ(ids[0], std::this_thread::get_id());
    EXPECT_NE(ids[1], ids[0]);
    EXPECT_EQ(counts, (std::array<int, 2>{2, 2}));
    EXPECT_EQ(at::get_num_threads(), 4);
  }
}

TEST_F(ViewThreadsTest, OneThreadRunsOneViewAfterTheOther) {
  for (const int count : {1, 3}) {
    at::set_num_threads(count);
    ViewThreads threads;
    std::vector<int64_t> views;
    threads.run([&](int64_t view) {
      views.push_back(view);
      EXPECT_EQ(at::get_num_threads(), count);
    });
    EXPECT_EQ(views, (std::vector<int64_t>{0, 1}));
  }
}

TEST_F(ViewThreadsTest, NormalisationsLetTheFirstViewPassFirst) {
  std::vector<int64_t> record;
  const auto norm = ordered(record);
  ViewThreads threads;
  for (int again = 0; again < 5; ++again) {
    threads.run([&](int64_t) { norm->forward(at::zeros({1}), {}); });
  }
  EXPECT_EQ(record, (std::vector<int64_t>{0, 1, 0, 1, 0, 1, 0, 1, 0, 1}));
  norm->forward(at::zeros({1}), {});  // alone, it waits for nobody
  EXPECT_EQ(record.back(), -1);
}

TEST_F(ViewThreadsTest, AnErrorOfEitherViewComesOutAndNobodyIsLeftWaiting) {
  std::vector<int64_t> record;
  const auto norm = ordered(record);
  ViewThreads threads;
  for (const int64_t bad : {0, 1, 0}) {
    try {
      threads.run([&](int64_t view) {
        if (view == bad) {
          throw std::invalid_argument("view " + std::to_string(view));
        }
        norm->forward(at::zeros({1}), {});
      });
      ADD_FAILURE() << "no error";
    } catch (const std::invalid_argument& error) {
      EXPECT_EQ(error.what(), "view " + std::to_string(bad));
    }
    threads.run([&](int64_t) { norm->forward(at::zeros({1}), {}); });
  }
}

}  // namespace
}  // namespace m2teacher
