#include "device/upload.h"

#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace m2teacher {

at::Tensor on_device(const at::Tensor& host, at::Device device) {
  if (device.is_cpu()) {
    return host;
  }
  return (device.is_cuda() ? host.pin_memory() : host).to(device, /*non_blocking=*/true);
}

at::Tensor Upload::operator()(const at::Tensor& host) {
  if (!device_.is_cuda()) {
    return host.to(device_);
  }
  const c10::impl::VirtualGuardImpl backend(device_.type());
  const c10::Stream computing = backend.getStream(device_);
  if (!stream_) {
    stream_ = backend.getStreamFromGlobalPool(device_);
  }
  c10::Event copied(device_.type());
  at::Tensor images;
  {
    const c10::StreamGuard guard(*stream_);
    images = host.to(device_, /*non_blocking=*/true);
    copied.record(*stream_);
  }
  copied.block(computing);
  // Its memory is the copying stream's, which must not use it again before the computing one is done with it.
  images.record_stream(computing);
  return images;
}

}  // namespace m2teacher
