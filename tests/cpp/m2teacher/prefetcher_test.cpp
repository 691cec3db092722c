// Without libtorch, so that it can be run under ThreadSanitizer.

#include "data/prefetcher.h"

#include <gtest/gtest.h>

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <fstream>
#include <functional>
#include <string>
#include <thread>
#include <vector>

namespace m2teacher {
namespace {

using Batch = std::vector<int64_t>;
using Numbers = Prefetcher<Batch>;

/// Batch b has 1 + b % 5 items, item i is 100 b + i.
Numbers::Work numbers(int64_t first, int64_t end) {
  const auto items = [](int64_t number) { return 1 + number % 5; };
  return {.first = first,
          .end = end,
          .items = items,
          .make = [items](int64_t number) { return Batch(static_cast<size_t>(items(number))); },
          .fill = [](Batch& batch, int64_t number,
                     int64_t item) { batch[static_cast<size_t>(item)] = 100 * number + item; },
          .thread_start = nullptr};
}

void expect_numbers(Numbers& prefetcher, int64_t first, int64_t end) {
  for (int64_t number = first; number < end; ++number) {
    EXPECT_EQ(prefetcher.position(), number);
    const auto batch = prefetcher.next();
    ASSERT_TRUE(batch.has_value());
    ASSERT_EQ(static_cast<int64_t>(batch->size()), 1 + number % 5);
    for (size_t item = 0; item < batch->size(); ++item) {
      EXPECT_EQ((*batch)[item], 100 * number + static_cast<int64_t>(item));
    }
  }
}

TEST(Prefetcher, GivesBatchesInOrderWhateverTheNumberOfThreads) {
  for (const int threads : {1, 2, 7}) {
    for (const int64_t ahead : {1, 3, 50}) {
      Numbers prefetcher({.threads = threads, .batches_ahead = ahead}, numbers(4, 200));
      expect_numbers(prefetcher, 4, 200);
      EXPECT_FALSE(prefetcher.next().has_value());
      EXPECT_FALSE(prefetcher.next().has_value());
    }
  }
}

TEST(Prefetcher, MayBeLeftInTheMiddle) {
  for (int taken = 0; taken < 5; ++taken) {
    Numbers prefetcher({.threads = 3, .batches_ahead = 2}, numbers(0, 1000));
    expect_numbers(prefetcher, 0, taken);
  }
  const Numbers empty({.threads = 3, .batches_ahead = 2}, numbers(5, 5));
}

TEST(Prefetcher, DoesNotRunAheadFurtherThanAllowed) {
  std::atomic<int64_t> begun{0};
  Numbers::Work work = numbers(0, 1000);
  work.make = [&](int64_t number) {
    begun = number;
    return Batch(static_cast<size_t>(1 + number % 5));
  };
  Numbers prefetcher({.threads = 4, .batches_ahead = 3}, std::move(work));
  for (int64_t number = 0; number < 100; ++number) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    EXPECT_LE(begun, number + 3);
    prefetcher.next();
  }
}

TEST(Prefetcher, ThrowsWhatTheFirstBadItemThrewWithItsBatch) {
  for (const int threads : {1, 4}) {
    Numbers::Work work = numbers(0, 20);
    work.fill = [](Batch&, int64_t number, int64_t item) {
      if (number == 9 && item >= 2) {
        std::this_thread::sleep_for(std::chrono::milliseconds(item == 2 ? 5 : 0));
        throw std::invalid_argument("item " + std::to_string(item));
      }
    };
    Numbers prefetcher({.threads = threads, .batches_ahead = 4}, std::move(work));
    for (int number = 0; number < 9; ++number) {
      prefetcher.next();
    }
    try {
      prefetcher.next();
      ADD_FAILURE() << "no error";
    } catch (const std::invalid_argument& error) {
      EXPECT_STREQ(error.what(), "item 2");
    }
    EXPECT_TRUE(prefetcher.next().has_value());
  }
}

TEST(Prefetcher, ThrowsWhatMakingABatchThrew) {
  Numbers::Work work = numbers(0, 3);
  work.make = [](int64_t number) {
    if (number == 1) {
      throw std::bad_alloc();
    }
    return Batch(5);
  };
  Numbers prefetcher({.threads = 2, .batches_ahead = 4}, std::move(work));
  EXPECT_TRUE(prefetcher.next().has_value());
  EXPECT_THROW(prefetcher.next(), std::bad_alloc);
  EXPECT_TRUE(prefetcher.next().has_value());
}

TEST(Prefetcher, GivesUpOnAnItemThatNeverComes) {
  auto forever = std::make_shared<std::atomic<bool>>(true);
  const auto start = std::chrono::steady_clock::now();
  {
    Numbers::Work work = numbers(0, 20);
    work.fill = [forever](Batch&, int64_t number, int64_t) {
      while (number == 2 && *forever) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    };
    Numbers prefetcher({.threads = 2, .batches_ahead = 1, .timeout = std::chrono::milliseconds(200)}, std::move(work));
    prefetcher.next();
    prefetcher.next();
    EXPECT_THROW(prefetcher.next(), PrefetchTimeout);
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
  *forever = false;
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // the thread that was left to itself ends
}

TEST(Prefetcher, WaitsAsLongAsItemsComeIn) {
  Numbers::Work work = numbers(4, 5);
  work.fill = [](Batch&, int64_t, int64_t) { std::this_thread::sleep_for(std::chrono::milliseconds(60)); };
  Numbers prefetcher({.threads = 1, .batches_ahead = 1, .timeout = std::chrono::milliseconds(150)}, std::move(work));
  EXPECT_TRUE(prefetcher.next().has_value());  // five items of 60 ms
}

/// Exit code of a child process that does this.
template <typename Call>
int exit_code_of(const Call& call, const std::function<void(pid_t)>& meanwhile = [](pid_t) {}) {
  const pid_t child = fork();
  if (child == 0) {
    _exit(call());
  }
  meanwhile(child);
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(Prefetcher, DoesNotCountTimeInWhichTheProcessIsStopped) {
  using std::chrono::milliseconds;
  const auto read_slowly = [] {
    Numbers::Work work = numbers(0, 1);
    work.fill = [](Batch&, int64_t, int64_t) {
      std::this_thread::sleep_for(milliseconds(400));
      std::this_thread::sleep_for(milliseconds(600));
    };
    Numbers prefetcher({.threads = 1, .timeout = std::chrono::seconds(2)}, work);
    try {
      return prefetcher.next() ? 0 : 1;
    } catch (const PrefetchTimeout&) {
      return 2;
    }
  };
  const auto stop_for_long = [](pid_t child) {
    std::this_thread::sleep_for(milliseconds(200));
    kill(child, SIGSTOP);
    std::this_thread::sleep_for(milliseconds(3000));
    kill(child, SIGCONT);
  };
  EXPECT_EQ(exit_code_of(read_slowly, stop_for_long), 0);
}

#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)  // which take all addresses there are
TEST(Prefetcher, AThreadThatCannotBeStartedIsAnError) {
  EXPECT_EQ(exit_code_of([] {
              int64_t pages = 0;
              std::ifstream("/proc/self/statm") >> pages;
              const rlim_t room = static_cast<rlim_t>(pages * sysconf(_SC_PAGESIZE)) + (rlim_t{300} << 20);
              const rlimit limit = {room, room};
              setrlimit(RLIMIT_AS, &limit);
              try {
                const Numbers prefetcher({.threads = 1000}, numbers(0, 1));
                return 1;
              } catch (const std::runtime_error& error) {
                return std::string(error.what()).find("of 1000 threads that read images") != std::string::npos ? 0 : 2;
              }
            }),
            0);
}
#endif

}  // namespace
}  // namespace m2teacher
