#include "ops/cuda/launch.h"

#include "ops/cuda/runtime.h"

#include <c10/core/Allocator.h>

namespace momentum_bn::cuda {
namespace {

kernels::cuda::Device properties(c10::Device device) {
  use_device(device);
  kernels::cuda::Device result = {};
  check(kernels::cuda::current_device(result), "cudaDeviceGetAttribute");
  return result;
}

}  // namespace

Launch::Launch(const at::Tensor& x)
    : guard_(x.device()),
      torch_device_(x.device()),
      device_(properties(x.device())),
      stream_(current_stream(x.device())) {}

unsigned* Launch::counters() {
  if (!counters_) {
    counters_.emplace(torch_device_, stream_);
  }
  return counters_->get();
}

void* Launch::workspace(size_t bytes) {
  // Not as a tensor: torch's deterministic mode would fill it.
  workspace_ = c10::GetAllocator(torch_device_.type())->allocate(bytes);
  return workspace_.get();
}

}  // namespace momentum_bn::cuda
