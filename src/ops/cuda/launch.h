#pragma once

#include "kernels/cuda/kernels.h"
#include "ops/cuda/counters.h"

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>

#include <cstddef>
#include <optional>

namespace momentum_bn::cuda {

/// Where the kernels of one call run: on x's device, the current one meanwhile, in torch's current stream of it.
///
/// Memory follows the rule of torch's caching allocator: what is freed here, while the kernels may still be waiting, is
/// given only to work behind them in the same stream.
class Launch {
 public:
  explicit Launch(const at::Tensor& x);

  const kernels::cuda::Device& device() const { return device_; }
  kernels::cuda::Stream stream() const { return stream_; }
  /// Every call on this object returns the same ones.
  unsigned* counters();
  /// Returns uninitialised memory, aligned to 256 bytes, that is valid as long as this object.
  void* workspace(size_t bytes);

 private:
  c10::DeviceGuard guard_;
  c10::Device torch_device_;
  kernels::cuda::Device device_;
  kernels::cuda::Stream stream_;
  std::optional<Counters> counters_;
  c10::DataPtr workspace_;
};

}  // namespace momentum_bn::cuda
