#include "emulator.h"

#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <map>
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
/// As if the kernels had been compiled for an older device than the emulated one.
constexpr int kCompiledFor = 89;
constexpr unsigned kMostSlices = 65'535;
constexpr unsigned char kPoison = 0xFF;  // NaN in every type
constexpr unsigned char kGuard = 0xA5;
constexpr size_t kGuardBytes = 256;

uint64_t order_seed = 0;
int64_t launch_count = 0;
bool clusters_refused = false;
cudaError_t last_error = cudaSuccess;
cudaError_t next_error = cudaSuccess;
std::string errors;

void complain(const std::string& error) { errors += error + "; "; }

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

  /// Returns the generation that ends when all have come.
  uint64_t arrive(bool value) {
    any = any || value;
    if (++arrived < expected) {
      return generation;
    }
    arrived = 0;
    any_of_last = any;
    any = false;
    return generation++;
  }
};

struct Block {
  dim3 index;
  Barrier barrier;
  std::vector<uint4> shared;
  size_t shared_bytes = 0;
  size_t threads_left = 0;
  struct Cluster* cluster = nullptr;

  unsigned char* memory() { return reinterpret_cast<unsigned char*>(shared.data()); }
  bool guard_is_intact() {
    return std::all_of(memory() + shared_bytes, memory() + shared_bytes + kGuardBytes,
                       [](unsigned char byte) { return byte == kGuard; });
  }
};

/// Blocks that run at the same time.
struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
};

/// A thread of a kernel, on a stack of its own.
struct Fiber {
  std::unique_ptr<unsigned char[]> stack = std::make_unique<unsigned char[]>(kStackBytes);
  ucontext_t context = {};
  jmp_buf resume_at;
  bool has_stack_frame = false;
  bool done = false;
  Block* block = nullptr;
  unsigned thread = 0;
  const Barrier* waits_for = nullptr;
  uint64_t waits_behind = 0;
  uint64_t arrived_behind = 0;  // at the cluster's barrier

  bool is_ready() const { return !done && (!waits_for || waits_for->generation != waits_behind); }
};

size_t blocks_in_cluster(const cudaLaunchConfig_t& config) {
  return config.numAttrs == 0 ? 1 : config.attrs[0].val.clusterDim.y;
}

class Scheduler {
 public:
  void run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
    body_ = &thread;
    blockDim = config.blockDim;
    gridDim = config.gridDim;
    const size_t in_cluster = blocks_in_cluster(config);
    const size_t columns = config.gridDim.x;
    for (const size_t index : drawn_order(columns * config.gridDim.y / in_cluster, 1)) {
      std::vector<size_t> blocks;
      for (size_t rank = 0; rank < in_cluster; ++rank) {
        blocks.push_back((index / columns * in_cluster + rank) * columns + index % columns);
      }
      run_together(config, blocks);
    }
  }

  Fiber& running() { return *running_; }

  /// Of the thread that runs: others have their turn until `barrier` opens that it reached in `generation`.
  void wait_for(const Barrier& barrier, uint64_t generation) {
    running_->waits_for = &barrier;
    running_->waits_behind = generation;
    if (_setjmp(running_->resume_at) == 0) {
      _longjmp(scheduler_, 1);
    }
  }

 private:
  void run_together(const cudaLaunchConfig_t& config, const std::vector<size_t>& indices) {
    const size_t threads = config.blockDim.x;
    Cluster cluster;
    auto& blocks = cluster.blocks;
    blocks.resize(indices.size());
    cluster.barrier.expected = threads * blocks.size();
    for (size_t i = 0; i < blocks.size(); ++i) {
      prepare(blocks[i], config, indices[i]);
      blocks[i].cluster = &cluster;
    }
    while (fibers_.size() < blocks.size() * threads) {
      fibers_.push_back(std::make_unique<Fiber>());
    }
    for (size_t i = 0; i < blocks.size() * threads; ++i) {
      Fiber& fiber = *fibers_[i];
      fiber.done = false;
      fiber.block = &blocks[i / threads];
      fiber.thread = static_cast<unsigned>(i % threads);
      fiber.waits_for = nullptr;
    }
    take_turns(blocks.size(), threads, 3 * indices[0] + 2);
    for (Block& block : blocks) {
      if (!block.guard_is_intact()) {
        complain("written beyond shared memory");
      }
    }
  }

  static void prepare(Block& block, const cudaLaunchConfig_t& config, size_t index) {
    block.index =
        dim3(static_cast<unsigned>(index % config.gridDim.x), static_cast<unsigned>(index / config.gridDim.x));
    block.barrier.expected = config.blockDim.x;
    block.threads_left = config.blockDim.x;
    block.shared_bytes = config.dynamicSmemBytes;
    block.shared.resize((block.shared_bytes + kGuardBytes) / sizeof(uint4) + 1);
    std::memset(block.memory(), kPoison, block.shared_bytes);
    std::memset(block.memory() + block.shared_bytes, kGuard, kGuardBytes);
  }

  /// Each block gets as far as it can without the others.
  void take_turns(size_t blocks, size_t threads, uint64_t salt) {
    const auto block_order = drawn_order(blocks, salt);
    const auto thread_order = drawn_order(threads, salt + 1);
    for (size_t left = blocks * threads; left > 0;) {
      size_t moves = 0;
      for (const size_t block : block_order) {
        while (const size_t more = run_each(block * threads, thread_order, left)) {
          moves += more;
        }
      }
      if (moves > 0) {
        continue;
      }
      complain(std::to_string(left) + " threads wait at a barrier that others left out");
      fibers_.clear();
      return;
    }
  }

  /// Each ready thread of a block once; how many there were.
  size_t run_each(size_t first, const std::vector<size_t>& order, size_t& left) {
    size_t moves = 0;
    for (const size_t thread : order) {
      Fiber& fiber = *fibers_[first + thread];
      if (!fiber.is_ready()) {
        continue;
      }
      resume(fiber);
      ++moves;
      if (fiber.done) {
        --left;
      }
    }
    return moves;
  }

  void resume(Fiber& fiber) {
    running_ = &fiber;
    fiber.waits_for = nullptr;
    threadIdx = dim3(fiber.thread, 0, 0);
    blockIdx = fiber.block->index;
    if (_setjmp(scheduler_) != 0) {
      return;
    }
    if (fiber.has_stack_frame) {
      _longjmp(fiber.resume_at, 1);
    }
    fiber.has_stack_frame = true;
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
/// What kernels were given leave to use.
std::map<std::pair<int, const void*>, size_t> most_shared_bytes;

/// Runs one thread of a kernel after the other.
void Scheduler::enter() {
  for (;;) {
    Fiber& fiber = *scheduler.running_;
    (*scheduler.body_)();
    fiber.done = true;
    --fiber.block->threads_left;
    if (_setjmp(fiber.resume_at) == 0) {
      _longjmp(scheduler.scheduler_, 1);
    }
  }
}

}  // namespace

void set_order(uint64_t seed) { order_seed = seed; }

void refuse_clusters(bool refuse) { clusters_refused = refuse; }

void fail_next_launch(int error) { next_error = error; }

int64_t launches() { return launch_count; }

std::string take_errors() { return std::exchange(errors, ""); }

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  constexpr size_t kUnasked = 48 * 1024;
  constexpr size_t kMostInCluster = 8;
  const unsigned threads = config.blockDim.x;
  const size_t in_cluster = blocks_in_cluster(config);
  if (threads == 0 || threads > kMostThreads || config.gridDim.x == 0 || config.gridDim.y == 0 ||
      config.gridDim.y > kMostSlices || in_cluster == 0 || in_cluster > kMostInCluster ||
      config.gridDim.y % in_cluster != 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (next_error != cudaSuccess) {
    return last_error = std::exchange(next_error, cudaSuccess);
  }
  if (clusters_refused && in_cluster > 1) {
    return last_error = cudaErrorInvalidConfiguration;
  }
  if (config.dynamicSmemBytes > std::max(kUnasked, most_shared_bytes[{clusters_refused, kernel}])) {
    return cudaErrorInvalidValue;
  }
  ++launch_count;
  scheduler.run(config, thread);
  return cudaSuccess;
}

}  // namespace momentum_bn::emulator

using momentum_bn::emulator::scheduler;

void __syncthreads() { __syncthreads_or(0); }

int __syncthreads_or(int value) {
  auto& barrier = scheduler.running().block->barrier;
  scheduler.wait_for(barrier, barrier.arrive(value != 0));
  return barrier.any_of_last;
}

void __cluster_barrier_arrive() {
  auto& fiber = scheduler.running();
  fiber.arrived_behind = fiber.block->cluster->barrier.arrive(false);
}

void __cluster_barrier_wait() {
  auto& fiber = scheduler.running();
  scheduler.wait_for(fiber.block->cluster->barrier, fiber.arrived_behind);
}

void* __cluster_map_shared_rank(const void* address, unsigned rank) {
  auto& block = *scheduler.running().block;
  auto& other = block.cluster->blocks[rank];
  if (other.threads_left == 0) {
    momentum_bn::emulator::complain("reads of a block that has ended");
  }
  return other.memory() + (static_cast<const unsigned char*>(address) - block.memory());
}

unsigned atomicAdd(unsigned* to, unsigned value) { return std::exchange(*to, *to + value); }

unsigned char* emulated_shared_memory() { return scheduler.running().block->memory(); }

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  momentum_bn::emulator::most_shared_bytes[{momentum_bn::emulator::clusters_refused, kernel}] =
      static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = momentum_bn::emulator::clusters_refused ? 0 : 1;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)()) {
  attributes->ptxVersion = momentum_bn::emulator::kCompiledFor;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(momentum_bn::emulator::last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* device) {
  *device = momentum_bn::emulator::clusters_refused;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = [attribute] {
    switch (attribute) {
      case cudaDevAttrMultiProcessorCount:
        return 132;
      case cudaDevAttrComputeCapabilityMajor:
        return 9;
      case cudaDevAttrComputeCapabilityMinor:
        return 0;
      case cudaDevAttrMaxThreadsPerMultiProcessor:
        return 2048;
      case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        return 227 * 1024;
      case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        return 228 * 1024;
      case cudaDevAttrL2CacheSize:
        return 50 * 1024 * 1024;
    }
    return 0;
  }();
  return cudaSuccess;
}
