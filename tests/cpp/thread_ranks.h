#pragma once

#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

// A process group whose ranks are threads of one process: torch's wheels lack the headers of Gloo, and a test of the
// C++ layer and of gradients needs no more than an all_gather and an all_reduce.

namespace momentum_bn::testing {

/// Where ranks exchange tensors, one collective at a time.
class Exchange {
 public:
  explicit Exchange(int ranks) : given_(static_cast<size_t>(ranks)) {}

  /// Blocks until all ranks came. @throws std::runtime_error where one does not
  std::vector<at::Tensor> all_gather(int rank, const at::Tensor& mine) {
    std::unique_lock lock(mutex_);
    given_[static_cast<size_t>(rank)] = mine.clone();
    meet(lock);
    auto all = given_;
    meet(lock);  // nobody gives again before everybody took
    return all;
  }

 private:
  void meet(std::unique_lock<std::mutex>& lock) {
    const int64_t meeting = meetings_;
    if (++here_ == given_.size()) {
      here_ = 0;
      ++meetings_;
      all_here_.notify_all();
    } else if (!all_here_.wait_for(lock, std::chrono::seconds(20), [&] { return meetings_ != meeting; })) {
      throw std::runtime_error("a rank did not come to a collective");
    }
  }

  std::mutex mutex_;
  std::condition_variable all_here_;
  std::vector<at::Tensor> given_;
  size_t here_ = 0;
  int64_t meetings_ = 0;
};

class DoneWork : public c10d::Work {
 public:
  bool wait(std::chrono::milliseconds /*timeout*/) override { return true; }
};

/// One rank's end of an Exchange.
class ThreadBackend : public c10d::Backend {
 public:
  ThreadBackend(int rank, int ranks, Exchange& exchange) : Backend(rank, ranks), exchange_(exchange) {}

  const std::string getBackendName() const override { return "threads"; }

  c10::intrusive_ptr<c10d::Work> _allgather_base(at::Tensor& output, at::Tensor& input,
                                                 const c10d::AllgatherOptions& /*options*/) override {
    gather(output, input);
    return c10::make_intrusive<DoneWork>();
  }

  c10::intrusive_ptr<c10d::Work> allgather_into_tensor_coalesced(std::vector<at::Tensor>& outputs,
                                                                 std::vector<at::Tensor>& inputs,
                                                                 const c10d::AllgatherOptions& /*options*/) override {
    for (size_t i = 0; i < inputs.size(); ++i) {
      gather(outputs[i], inputs[i]);
    }
    return c10::make_intrusive<DoneWork>();
  }

  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors,
                                           const c10d::AllreduceOptions& /*options*/) override {
    for (auto& tensor : tensors) {
      ++collectives;
      tensor.copy_(at::stack(exchange_.all_gather(getRank(), tensor)).sum(0));
    }
    return c10::make_intrusive<DoneWork>();
  }

  int64_t collectives = 0;

 private:
  void gather(at::Tensor& output, const at::Tensor& input) {
    ++collectives;
    output.copy_(at::cat(exchange_.all_gather(getRank(), input)));
  }

  Exchange& exchange_;
};

struct ThreadRank {
  int rank;
  /// Of the group, on this rank: in one process each rank's group has a name of its own.
  std::string group;
  const ThreadBackend& backend;
};

/// Runs `body` on `ranks` threads. @throws what the first rank to throw threw
inline void run_on_ranks(int ranks, const std::function<void(const ThreadRank&)>& body) {
  Exchange exchange(ranks);
  std::vector<std::exception_ptr> errors(static_cast<size_t>(ranks));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      const auto backend = c10::make_intrusive<ThreadBackend>(rank, ranks, exchange);
      const auto group = c10::make_intrusive<c10d::ProcessGroup>(rank, ranks);
      group->setBackend(c10::DeviceType::CPU, c10d::ProcessGroup::BackendType::CUSTOM,
                        std::optional<c10::intrusive_ptr<c10d::Backend>>(backend));
      group->setDefaultBackend(c10d::ProcessGroup::BackendType::CUSTOM);
      const std::string name = "thread " + std::to_string(rank);
      c10d::register_process_group(name, group);
      try {
        body({rank, name, *backend});
      } catch (...) {
        errors[static_cast<size_t>(rank)] = std::current_exception();
      }
      c10d::unregister_process_group(name);
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  for (const auto& error : errors) {
    if (error) {
      std::rethrow_exception(error);
    }
  }
}

}  // namespace momentum_bn::testing
