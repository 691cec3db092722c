#include "ops/cuda/launch.h"

#include "ops/cuda/runtime.h"

#include <ATen/ops/empty.h>

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
      options_(at::TensorOptions().dtype(at::kByte).device(x.device())),
      device_(properties(x.device())),
      stream_(current_stream(x.device())) {}

unsigned* Launch::counters() {
  if (!counters_) counters_.emplace(options_.device(), stream_);
  return counters_->get();
}

void* Launch::workspace(size_t bytes) {
  workspace_ = at::empty({static_cast<int64_t>(bytes)}, options_);
  return workspace_.mutable_data_ptr();
}

}  // namespace momentum_bn::cuda
