#include "ops/cuda/launch.h"

#include "ops/cuda/runtime.h"

#include <ATen/ops/empty.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace momentum_bn::cuda {
namespace {

kernels::cuda::Device properties(c10::Device device) {
  use_device(device);
  kernels::cuda::Device result = {};
  check(kernels::cuda::current_device(result), "cudaDeviceGetAttribute");
  return result;
}

/// torch's current one. Through c10 alone: nothing of torch's CUDA libraries is linked.
kernels::cuda::Stream current_stream(c10::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

}  // namespace

Launch::Launch(const at::Tensor& x)
    : guard_(x.device()),
      options_(at::TensorOptions().dtype(at::kByte).device(x.device())),
      device_(properties(x.device())),
      stream_(current_stream(x.device())) {}

unsigned* Launch::counters() {
  if (!counters_) counters_.emplace(options_.device(), stream_);
  return counters_->get();
}

void* Launch::workspace(size_t bytes) {
  workspace_ = at::empty({static_cast<int64_t>(bytes)}, options_);
  return workspace_.data_ptr();
}

}  // namespace momentum_bn::cuda
