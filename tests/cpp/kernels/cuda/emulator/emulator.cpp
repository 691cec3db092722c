#include "emulator.h"

#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

dim3 threadIdx;
dim3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace momentum_bn::emulator {
namespace {

constexpr size_t kStackBytes = size_t{128} * 1024;
constexpr unsigned kMostThreads = 1024;
constexpr unsigned kMostSlices = 65'535;
constexpr unsigned char kPoison = 0xFF;  // NaN in every type
constexpr unsigned char kGuard = 0xA5;
constexpr size_t kGuardBytes = 256;

uint64_t order_seed = 0;
int64_t launch_count = 0;
std::string errors;

std::vector<size_t> drawn_order(size_t count, uint64_t salt) {
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  if (order_seed != 0) {
    std::mt19937_64 generator(order_seed ^ salt * 0x9E3779B97F4A7C15);
    std::shuffle(order.begin(), order.end(), generator);
  }
  return order;
}

/// A thread waits here until all have come.
struct Barrier {
  size_t expected = 0;
  size_t arrived = 0;
  uint64_t generation = 0;
  bool any = false;
  bool any_of_last = false;

  void arrive(bool value) {
    any = any || value;
    if (++arrived < expected) return;
    arrived = 0;
    any_of_last = any;
    any = false;
    ++generation;
  }
};

struct Block {
  dim3 index;
  Barrier barrier;
  std::vector<uint4> shared;
  size_t shared_bytes = 0;

  unsigned char* memory() { return reinterpret_cast<unsigned char*>(shared.data()); }
  bool guard_is_intact() {
    return std::all_of(memory() + shared_bytes, memory() + shared_bytes + kGuardBytes,
                       [](unsigned char byte) { return byte == kGuard; });
  }
};

/// A thread of a kernel, on a stack of its own.
struct Fiber {
  std::unique_ptr<unsigned char[]> stack = std::make_unique<unsigned char[]>(kStackBytes);
  ucontext_t context = {};
  jmp_buf resume_at;
  bool started = false;
  bool done = false;
  Block* block = nullptr;
  unsigned thread = 0;
  const Barrier* waits_for = nullptr;
  uint64_t waits_behind = 0;

  bool is_ready() const { return !done && (!waits_for || waits_for->generation != waits_behind); }
};

class Scheduler {
 public:
  void run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
    body_ = &thread;
    blockDim = config.blockDim;
    gridDim = config.gridDim;
    const size_t blocks = size_t{config.gridDim.x} * config.gridDim.y;
    for (const size_t index : drawn_order(blocks, 1)) run_together(config, {index});
  }

  Fiber& running() { return *running_; }

  /// Of the thread that runs: others have their turn until `barrier` opens.
  void wait_for(Barrier& barrier, bool value) {
    running_->waits_for = &barrier;
    running_->waits_behind = barrier.generation;
    barrier.arrive(value);
    if (_setjmp(running_->resume_at) == 0) _longjmp(scheduler_, 1);
  }

 private:
  void run_together(const cudaLaunchConfig_t& config, const std::vector<size_t>& indices) {
    std::vector<Block> blocks(indices.size());
    for (size_t i = 0; i < blocks.size(); ++i) prepare(blocks[i], config, indices[i]);
    const size_t threads = config.blockDim.x;
    while (fibers_.size() < blocks.size() * threads) fibers_.push_back(std::make_unique<Fiber>());
    for (size_t i = 0; i < blocks.size() * threads; ++i) {
      Fiber& fiber = *fibers_[i];
      fiber.started = fiber.done = false;
      fiber.block = &blocks[i / threads];
      fiber.thread = static_cast<unsigned>(i % threads);
      fiber.waits_for = nullptr;
    }
    take_turns(drawn_order(blocks.size() * threads, indices[0] + 2));
    for (Block& block : blocks) {
      if (!block.guard_is_intact()) errors += "written beyond shared memory; ";
    }
  }

  static void prepare(Block& block, const cudaLaunchConfig_t& config, size_t index) {
    block.index =
        dim3(static_cast<unsigned>(index % config.gridDim.x), static_cast<unsigned>(index / config.gridDim.x));
    block.barrier.expected = config.blockDim.x;
    block.shared_bytes = config.dynamicSmemBytes;
    block.shared.resize((block.shared_bytes + kGuardBytes) / sizeof(uint4) + 1);
    std::memset(block.memory(), kPoison, block.shared_bytes);
    std::memset(block.memory() + block.shared_bytes, kGuard, kGuardBytes);
  }

  void take_turns(const std::vector<size_t>& order) {
    for (size_t left = order.size(); left > 0;) {
      bool moved = false;
      for (const size_t i : order) {
        Fiber& fiber = *fibers_[i];
        if (!fiber.is_ready()) continue;
        resume(fiber);
        moved = true;
        if (fiber.done) --left;
      }
      if (moved) continue;
      errors += std::to_string(left) + " threads wait at a barrier that others left out; ";
      return;
    }
  }

  void resume(Fiber& fiber) {
    running_ = &fiber;
    fiber.waits_for = nullptr;
    threadIdx = dim3(fiber.thread, 0, 0);
    blockIdx = fiber.block->index;
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.resume_at, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Scheduler::enter, 0);
    setcontext(&fiber.context);
  }

  static void enter();

  const std::function<void()>* body_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Fiber* running_ = nullptr;
  jmp_buf scheduler_;
};

Scheduler scheduler;

void Scheduler::enter() {
  (*scheduler.body_)();
  scheduler.running_->done = true;
  _longjmp(scheduler.scheduler_, 1);
}

}  // namespace

void set_order(uint64_t seed) { order_seed = seed; }

int64_t launches() { return launch_count; }

std::string take_errors() { return std::exchange(errors, ""); }

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  const unsigned threads = config.blockDim.x;
  if (threads == 0 || threads > kMostThreads || config.gridDim.x == 0 || config.gridDim.y == 0 ||
      config.gridDim.y > kMostSlices) {
    return cudaErrorInvalidConfiguration;
  }
  ++launch_count;
  scheduler.run(config, thread);
  return cudaSuccess;
}

}  // namespace momentum_bn::emulator

using momentum_bn::emulator::scheduler;

void __syncthreads() { scheduler.wait_for(scheduler.running().block->barrier, false); }

int __syncthreads_or(int value) {
  auto& barrier = scheduler.running().block->barrier;
  scheduler.wait_for(barrier, value != 0);
  return barrier.any_of_last;
}

unsigned atomicAdd(unsigned* to, unsigned value) { return std::exchange(*to, *to + value); }

unsigned char* emulated_shared_memory() { return scheduler.running().block->memory(); }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = 10 + static_cast<int>(attribute);
  return cudaSuccess;
}
