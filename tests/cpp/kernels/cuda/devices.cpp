#include "devices.h"

namespace momentum_bn::kernels::cuda::test {
namespace {

constexpr int64_t kKiB = 1024;
constexpr int64_t kMiB = 1024 * kKiB;

}  // namespace

const std::vector<NamedDevice>& real_devices() {
  static const std::vector<NamedDevice> devices = {
      {"T4", {40, 75, 1024, 64 * kKiB, 64 * kKiB, 4 * kMiB}},
      {"A100", {108, 80, 2048, 163 * kKiB, 164 * kKiB, 40 * kMiB}},
      {"RTX 3090", {82, 86, 1536, 99 * kKiB, 100 * kKiB, 6 * kMiB}},
      {"RTX 4090", {128, 89, 1536, 99 * kKiB, 100 * kKiB, 72 * kMiB}},
      {"H100", {132, 90, 2048, 227 * kKiB, 228 * kKiB, 50 * kMiB}},
      {"H200", {132, 90, 2048, 227 * kKiB, 228 * kKiB, 50 * kMiB}},
      {"B200", {148, 100, 2048, 227 * kKiB, 228 * kKiB, 126 * kMiB}},
      {"RTX 5090", {170, 120, 1536, 99 * kKiB, 100 * kKiB, 96 * kMiB}},
  };
  return devices;
}

Device small_device(int capability, int64_t shared_kib) {
  return {3, capability, 1024, shared_kib * kKiB, 2 * shared_kib * kKiB, kMiB};
}

}  // namespace momentum_bn::kernels::cuda::test
