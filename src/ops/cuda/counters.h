#pragma once

#include "kernels/cuda/kernels.h"

#include <ATen/core/Tensor.h>

namespace momentum_bn::cuda {

/// The kernels' counters (see kernels/cuda/kernels.h) for the launches of one call into `stream` of the current device.
///
/// Launches of one stream run one after the other, so each stream has counters of its own, zeroed once and kept as long
/// as the process lives. They come from the driver, not from torch's caching allocator: while a CUDA graph is warmed up
/// that one hands out the graph's own memory, which must not be kept beyond the graph.
///
/// What is captured may be replayed on any stream, beside other graphs: each captured call has counters of its own, in
/// the graph's memory, zeroed by the graph. The same holds where the driver has no memory, or the streams are too many.
class Counters {
 public:
  Counters(c10::Device device, kernels::cuda::Stream stream);
  unsigned* get() const { return counters_; }

 private:
  at::Tensor of_this_call_;
  unsigned* counters_;
};

}  // namespace momentum_bn::cuda
