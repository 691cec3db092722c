#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

namespace m2teacher {

/// Runs something for each of the two views. The views are independent of each other but for the order in which they
/// pass a normalisation (`in_view_order`), so each has a thread of its own, with half of torch's threads for the
/// operations in it: that needs no waiting between the parts of each operation, and small operations, which torch does
/// not divide, run side by side, too.
class ViewThreads {
 public:
  /// @param side_by_side  whether there may be two threads: a device does one thing after the other in any case
  explicit ViewThreads(bool side_by_side = true) : side_by_side_(side_by_side) {}
  ~ViewThreads();
  ViewThreads(const ViewThreads&) = delete;
  ViewThreads& operator=(const ViewThreads&) = delete;

  using Work = std::function<void(int64_t view)>;

  /// work(0) in this thread, and work(1): beside it if torch may use an even number of threads here (or many), else
  /// after it. An exception of either is thrown again, that of the first view before that of the second.
  void run(const Work& work);

 private:
  void run_beside(const Work& work, int threads_each);
  void serve();

  bool side_by_side_;
  std::thread thread_;
  std::mutex mutex_;
  std::condition_variable changed_;
  const Work* work_ = nullptr;  // for the second thread; null: done
  int threads_each_ = 0;
  uint64_t runs_ = 0;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
  bool stopping_ = false;
};

}  // namespace m2teacher
