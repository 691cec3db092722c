#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

namespace m2teacher {

/// Waits until the condition holds, as std::condition_variable::wait does. That one is a function of g++ 12's runtime;
/// this one is compiled in, so that what g++ 12 compiles runs with older runtimes, too.
template <typename Condition>
void wait_until_true(std::condition_variable& changed, std::unique_lock<std::mutex>& lock, Condition condition) {
  while (!changed.wait_for(lock, std::chrono::hours(1), condition)) {
  }
}

}  // namespace m2teacher
