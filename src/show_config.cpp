#include <momentum_bn/show_config.h>

#include "kernels/cpu/dispatch.h"
#include "ops/cpu/parallel_for.h"
#ifdef MOMENTUM_BN_CUDA
#include "ops/cuda/driver.h"
#endif

#include <ATen/Parallel.h>
#include <torch/version.h>

#include <sstream>

namespace momentum_bn {
namespace {

#ifdef MOMENTUM_BN_CUDA
std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

/// What the machine's driver means for the kernels.
std::string driver() {
  if (cuda::driver_version() == 0) {
    return "no NVIDIA driver here";
  }
  const std::string found = "the driver's CUDA is " + version(cuda::driver_version());
  if (cuda::driver_suits()) {
    return found;
  }
  return found + ", older than the kernels' " + version(cuda::runtime_version()) +
         ": tensors on a GPU take the composite path";
}
#endif

std::string cuda_kernels() {
#ifdef MOMENTUM_BN_CUDA
  return "built for compute capability " MOMENTUM_BN_CUDA "; " + driver();
#else
  return "not built; tensors on a GPU take the composite path";
#endif
}

}  // namespace

std::string show_config() {
  std::ostringstream text;
  text << "momentum_bn " << MOMENTUM_BN_VERSION << ", built with torch " << TORCH_VERSION << "\n"
       << "CPU kernels built: " << kernels::built_capabilities() << "\n"
       << "CPU kernels in use: " << kernels::capability_in_use() << " (ATEN_CPU_CAPABILITY=default or avx2 lowers it)\n"
       << "CPU threads: " << at::get_num_threads() << ", " << cpu::threads_come_from() << "\n"
       << "CUDA kernels: " << cuda_kernels() << "\n"
       << "Other devices: composite path (torch's own operations)\n";
  return text.str();
}

}  // namespace momentum_bn
