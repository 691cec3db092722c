#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <optional>

namespace m2teacher {

/// A small tensor of the CPU's on a device, without waiting for what the device still has to do: it is copied from
/// pinned memory. The CPU's tensor itself where that is the device.
at::Tensor on_device(const at::Tensor& host, at::Device device);

/// Copies batches of images to a device while that still works on the step before.
class Upload {
 public:
  explicit Upload(at::Device device) : device_(device) {}

  /// @param host  of the CPU, in pinned memory if `wants_pinned()`: otherwise the copy waits for the device
  /// @return it on the device, for the operations that this thread launches from now on; on the CPU the same tensor
  at::Tensor operator()(const at::Tensor& host);
  bool wants_pinned() const { return device_.is_cuda(); }

 private:
  at::Device device_;
  std::optional<c10::Stream> stream_;  // for copies alone
};

}  // namespace m2teacher
