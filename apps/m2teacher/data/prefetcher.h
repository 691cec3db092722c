#pragma once

#include "wait.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

namespace m2teacher {

/// Nothing came in for too long.
class PrefetchTimeout : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Threads that fill batches ahead of the one who takes them, and hand them out in order whatever order they were
/// filled in. A batch has items, which any threads fill side by side. Knows nothing of torch.
template <typename Batch>
class Prefetcher {
 public:
  struct Options {
    int threads = 1;
    int64_t batches_ahead = 1;  ///< that may be begun before the one is taken that is next
    /// Without an item coming in, before `next` gives up; time in which the process was stopped does not count.
    std::chrono::duration<double> timeout{300.0};
  };

  /// What the threads call. An exception of `fill` comes out of the `next` that would have given its batch: that of the
  /// first such item, the others having been filled.
  struct Work {
    int64_t first;                                ///< number of the first batch
    int64_t end;                                  ///< one beyond that of the last batch
    std::function<int64_t(int64_t batch)> items;  ///< of a batch, at least 1
    std::function<Batch(int64_t batch)> make;
    std::function<void(Batch& batch, int64_t number, int64_t item)> fill;  ///< by several threads at once
    std::function<void()> thread_start;                                    ///< in each thread, first
  };

  Prefetcher(const Options& options, Work work) : state_(std::make_shared<State>(options, std::move(work))) {
    try {
      for (int i = 0; i < options.threads; ++i) {
        start_thread();
      }
    } catch (const std::system_error& error) {
      stop();
      throw std::runtime_error(
          "only " + std::to_string(threads_.size()) + " of " + std::to_string(options.threads) +
          " threads that read images can be started (--loader-threads): " + error.code().message());
    }
  }

  /// Does not wait for ever: threads that a file system holds are left to themselves.
  ~Prefetcher() { stop(); }
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;

  /// Number of the batch that `next` gives.
  int64_t position() const { return position_; }

  /// The next batch; nothing after the last one.
  /// @throws PrefetchTimeout, and whatever `fill` and `make` throw
  std::optional<Batch> next() {
    if (position_ == state_->work.end) {
      return std::nullopt;
    }
    std::unique_lock lock(state_->mutex);
    // Each part of the wait counts as it was meant, so that time in which the process was stopped does not count.
    const std::chrono::duration<double> part = std::min(state_->options.timeout, kPartOfWait);
    std::chrono::duration<double> waited{0};
    int64_t seen = state_->items_done;
    const auto ready = [&] { return !state_->slots.empty() && state_->slots.front().left == 0; };
    while (!state_->changed.wait_for(lock, part, ready)) {
      waited = state_->items_done == seen ? waited + part : std::chrono::duration<double>(0);
      seen = state_->items_done;
      if (waited >= state_->options.timeout) {
        given_up_ = true;
        throw PrefetchTimeout("no image has come in for " +
                              std::to_string(static_cast<int64_t>(state_->options.timeout.count())) + " s");
      }
    }
    Slot slot = std::move(state_->slots.front());
    state_->slots.pop_front();
    ++position_;
    state_->changed.notify_all();
    lock.unlock();
    if (slot.error) {
      std::rethrow_exception(slot.error);
    }
    return std::move(slot.batch);
  }

 private:
  static constexpr std::chrono::duration<double> kPartOfWait{0.1};

  struct Slot {
    int64_t number;
    std::optional<Batch> batch;
    int64_t items = 0;
    int64_t begun = 0;
    int64_t left = 0;
    std::exception_ptr error;
    int64_t error_item = 0;
  };

  /// Shared with the threads, which may outlive the prefetcher.
  struct State {
    State(const Options& chosen, Work given) : options(chosen), work(std::move(given)), next_batch(work.first) {}

    /// The slot with an item to fill, making the next batch where those begun have none; null: nothing to do now.
    Slot* claimable() {
      for (Slot& slot : slots) {
        if (slot.begun < slot.items) {
          return &slot;
        }
      }
      if (next_batch == work.end || static_cast<int64_t>(slots.size()) > options.batches_ahead) {
        return nullptr;
      }
      Slot& slot = slots.emplace_back();
      slot.number = next_batch++;
      try {
        slot.items = slot.left = work.items(slot.number);
        slot.batch = work.make(slot.number);
      } catch (...) {
        slot.items = slot.left = 0;
        slot.error = std::current_exception();
        changed.notify_all();
        return claimable();
      }
      return &slot;
    }

    void run() {
      if (work.thread_start) {
        work.thread_start();
      }
      std::unique_lock lock(mutex);
      Slot* slot = nullptr;
      for (;;) {
        wait_until_true(changed, lock, [&] { return stopping || (slot = claimable()) != nullptr; });
        if (stopping) {
          break;
        }
        const int64_t item = slot->begun++;
        fill(lock, *slot, item);
      }
      --running;
      changed.notify_all();
    }

    void fill(std::unique_lock<std::mutex>& lock, Slot& slot, int64_t item) {
      lock.unlock();
      std::exception_ptr error;
      try {
        work.fill(*slot.batch, slot.number, item);
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      if (error && (!slot.error || item < slot.error_item)) {
        slot.error = error;
        slot.error_item = item;
      }
      ++items_done;
      if (--slot.left == 0) {
        changed.notify_all();
      }
    }

    const Options options;
    const Work work;
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Slot> slots;  // the batches begun, in order; references stay valid as ends come and go
    int64_t next_batch;
    int64_t items_done = 0;
    int running = 0;
    bool stopping = false;
  };

  void start_thread() {
    {
      const std::lock_guard lock(state_->mutex);
      ++state_->running;
    }
    try {
      threads_.emplace_back([state = state_] { state->run(); });
    } catch (...) {
      const std::lock_guard lock(state_->mutex);
      --state_->running;
      throw;
    }
  }

  void stop() {
    std::unique_lock lock(state_->mutex);
    state_->stopping = true;
    state_->changed.notify_all();
    const std::chrono::duration<double> patience = given_up_ ? std::chrono::seconds(0) : state_->options.timeout;
    const bool ended = state_->changed.wait_for(lock, patience, [this] { return state_->running == 0; });
    lock.unlock();
    for (std::thread& thread : threads_) {
      if (ended) {
        thread.join();
      } else {
        thread.detach();
      }
    }
  }

  std::shared_ptr<State> state_;
  std::deque<std::thread> threads_;
  int64_t position_ = state_->work.first;
  bool given_up_ = false;
};

}  // namespace m2teacher
