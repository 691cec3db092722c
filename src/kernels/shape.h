#pragma once

#include <cstdint>

namespace momentum_bn::kernels {

enum class Type { kFloat, kDouble, kBFloat16, kHalf };

/// Dense values [outer][channels][inner]: NCHW is [N][C][HW], NHWC is [N * HW][C][1], (N, C) is [N][C][1].
struct Shape {
  int64_t outer;
  int64_t channels;
  int64_t inner;

  int64_t values() const { return outer * channels * inner; }
  int64_t values_per_channel() const { return outer * inner; }
};

}  // namespace momentum_bn::kernels
