#include "ops/cuda/counters.h"

#include "ops/cuda/runtime.h"

#include <ATen/ops/zeros.h>
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <utility>

namespace momentum_bn::cuda {
namespace {

/// The most streams that have counters of their own, which are then 16 MiB. torch has 65 streams per device, but a
/// program can make others without end.
constexpr size_t kMostStreams = 1024;

constexpr size_t kBytes = kernels::cuda::kCounters * sizeof(unsigned);

/// While one exists, this thread can allocate without ending the graph captures of other threads.
class RelaxedCapture {
 public:
  RelaxedCapture() { exchange(); }
  ~RelaxedCapture() { exchange(); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  void exchange() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

unsigned* zeroed_by_driver(cudaStream_t stream) {
  const RelaxedCapture relaxed;
  void* memory = nullptr;
  if (cudaMalloc(&memory, kBytes) != cudaSuccess) {
    (void)cudaGetLastError();  // it is no error: there is another way
    return nullptr;
  }
  check(cudaMemsetAsync(memory, 0, kBytes, stream), "cudaMemsetAsync");
  return static_cast<unsigned*>(memory);
}

/// The counters that are kept for a stream; null where there are none to be had.
unsigned* kept(int device, cudaStream_t stream) {
  // A stream's handle may be that of one destroyed before; its number is never used again.
  unsigned long long number = 0;
  check(cudaStreamGetId(stream, &number), "cudaStreamGetId");
  static std::mutex mutex;
  // Never destroyed: when a process ends, the driver may have gone before.
  static auto& of_streams = *new std::map<std::pair<int, unsigned long long>, unsigned*>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = of_streams.find({device, number});
  if (found != of_streams.end()) {
    return found->second;
  }
  if (of_streams.size() >= kMostStreams) {
    return nullptr;
  }
  auto* counters = zeroed_by_driver(stream);
  if (counters) {
    of_streams[{device, number}] = counters;
  }
  return counters;
}

bool is_capturing(cudaStream_t stream) {
  auto status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace

Counters::Counters(c10::Device device, kernels::cuda::Stream stream) : counters_(nullptr) {
  auto* const handle = static_cast<cudaStream_t>(stream);
  if (!is_capturing(handle)) {
    counters_ = kept(device.index(), handle);
  }
  if (counters_) {
    return;
  }
  of_this_call_ = at::zeros({kernels::cuda::kCounters}, at::TensorOptions().dtype(at::kInt).device(device));
  counters_ = static_cast<unsigned*>(of_this_call_.mutable_data_ptr());
}

}  // namespace momentum_bn::cuda
