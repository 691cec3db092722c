#include "ops/cuda/driver.h"

#include <cuda_runtime_api.h>

#include <dlfcn.h>

namespace momentum_bn::cuda {
namespace {

constexpr int kMajor = 1000;

int ask_driver() {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY);
  if (driver == nullptr) {
    return 0;
  }
  using GetVersion = int (*)(int*);
  const auto get_version = reinterpret_cast<GetVersion>(dlsym(driver, "cuDriverGetVersion"));
  int version = 0;
  return get_version != nullptr && get_version(&version) == 0 ? version : 0;
}

}  // namespace

int driver_version() {
  static const int version = ask_driver();
  return version;
}

int runtime_version() { return CUDART_VERSION; }

bool driver_suits() { return driver_version() == 0 || driver_version() / kMajor >= runtime_version() / kMajor; }

}  // namespace momentum_bn::cuda
