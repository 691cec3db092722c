#include "training/view_threads.h"

#include "models/view_order.h"

#include "threads.h"
#include "wait.h"

#include <ATen/Parallel.h>

namespace m2teacher {
namespace {

// From so many on the one that is left over where the number is odd does not matter.
constexpr int kManyThreads = 6;

/// Sets what belongs to a thread while it works on a view.
class ViewScope {
 public:
  ViewScope(int64_t view, uint64_t run, const std::atomic<bool>& failed) {
    ViewOrder::of_this_thread() = {.view = view, .run = run, .failed = &failed};
  }
  ~ViewScope() { ViewOrder::of_this_thread() = {}; }
  ViewScope(const ViewScope&) = delete;
  ViewScope& operator=(const ViewScope&) = delete;
};

/// torch's number of threads belongs to the calling thread, too.
class ThreadCount {
 public:
  explicit ThreadCount(int count) : before_(at::get_num_threads()) { set_threads_of_this_thread(count); }
  ~ThreadCount() { set_threads_of_this_thread(before_); }
  ThreadCount(const ThreadCount&) = delete;
  ThreadCount& operator=(const ThreadCount&) = delete;

 private:
  int before_;
};

}  // namespace

ViewThreads::~ViewThreads() {
  if (thread_.joinable()) {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
}

void ViewThreads::run(const Work& work) {
  const int threads = at::get_num_threads();
  if (side_by_side_ && (threads % 2 == 0 || threads >= kManyThreads)) {
    run_beside(work, threads / 2);
  } else {
    work(0);
    work(1);
  }
}

void ViewThreads::run_beside(const Work& work, int threads_each) {
  if (!thread_.joinable()) {
    thread_ = std::thread([this] { serve(); });
  }
  failed_ = false;
  {
    const std::lock_guard lock(mutex_);
    ++runs_;
    threads_each_ = threads_each;
    work_ = &work;
  }
  changed_.notify_all();

  std::exception_ptr error;
  {
    const ThreadCount count(threads_each);
    const ViewScope scope(0, runs_, failed_);
    try {
      work(0);
    } catch (...) {
      error = std::current_exception();
      failed_ = true;
    }
  }
  std::unique_lock lock(mutex_);
  wait_until_true(changed_, lock, [this] { return work_ == nullptr; });
  if (!error) {
    error = error_;
  }
  error_ = nullptr;
  if (error) {
    std::rethrow_exception(error);
  }
}

void ViewThreads::serve() {
  int threads = 0;
  std::unique_lock lock(mutex_);
  for (;;) {
    wait_until_true(changed_, lock, [this] { return stopping_ || work_ != nullptr; });
    if (stopping_) {
      return;
    }
    if (threads != threads_each_) {
      threads = threads_each_;
      set_threads_of_this_thread(threads);
    }
    const Work& work = *work_;
    const ViewScope scope(1, runs_, failed_);
    lock.unlock();
    std::exception_ptr error;
    try {
      work(1);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    error_ = error;
    work_ = nullptr;
    changed_.notify_all();
  }
}

}  // namespace m2teacher
