#pragma once

#include "kernels/cpu/pack.h"

// One run of consecutive values of one channel.

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// y = (x - center) * scale + shift
template <typename T>
struct Coefficients {
  Pack<T> center;
  Pack<T> scale;
  Pack<T> shift;

  Coefficients(Accumulate<T> center, Accumulate<T> scale, Accumulate<T> shift)
      : center(Pack<T>::all(center)), scale(Pack<T>::all(scale)), shift(Pack<T>::all(shift)) {}

  Pack<T> apply(const Pack<T>& x) const { return normalized(x, center, scale, shift); }
};

/// kStream: y is aligned for it.
template <typename T, bool kResidual, bool kRelu, bool kStream>
inline void normalize_run(const T* x, const T* residual, T* y, int64_t n, const Coefficients<T>& of_channel) {
  const Coefficients<T> coefficients = of_channel;  // y may be anything: in registers
  using P = Pack<T>;
  const auto compute = [&](const P& values, const P& added) {
    P result = coefficients.apply(values);
    if constexpr (kResidual) result = result + added;
    if constexpr (kRelu) result = relu(result);
    return result;
  };
  constexpr int kUnroll = 4;
  int64_t i = 0;
  const auto one_pack = [&](int64_t at) {
    compute(P::load_any_order(x + at), kResidual ? P::load_any_order(residual + at) : P())
        .template store_any_order<kStream>(y + at);
  };
  for (; i + kUnroll * P::kSize <= n; i += kUnroll * P::kSize) {
    for (int u = 0; u < kUnroll; ++u) one_pack(i + u * P::kSize);
  }
  for (; i + P::kSize <= n; i += P::kSize) one_pack(i);
  if (i < n) compute(P::load(x + i, n - i), kResidual ? P::load(residual + i, n - i) : P()).store(y + i, n - i);
}

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
