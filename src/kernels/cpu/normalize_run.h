#pragma once

#include "kernels/channel_rules.h"
#include "kernels/cpu/simd/pack.h"

#include <array>
#include <cstdint>

// This file normalises one run of consecutive values of one channel.

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// The coefficients of the channel, or channels, of a pack: y = (x - center) * scale + shift.
template <typename T>
struct PackCoefficients {
  Pack<T> center;
  Pack<T> scale;
  Pack<T> shift;

  PackCoefficients() = default;
  explicit PackCoefficients(const Coefficients<Accumulate<T>>& of_channel)
      : center(Pack<T>::all(of_channel.center)),
        scale(Pack<T>::all(of_channel.scale)),
        shift(Pack<T>::all(of_channel.shift)) {}
  PackCoefficients(const Pack<T>& center, const Pack<T>& scale, const Pack<T>& shift)
      : center(center), scale(scale), shift(shift) {}

  MOMENTUM_BN_INLINE Pack<T> apply(const Pack<T>& x) const { return normalized(x, center, scale, shift); }
};

/// The places where a run is read and written.
template <typename T>
struct ForwardRun {
  const T* x;
  const T* residual;  // or null
  T* y;
};

template <typename T, bool kResidual, bool kRelu>
MOMENTUM_BN_INLINE Pack<T> normalized_pack(const PackCoefficients<T>& coefficients, const Pack<T>& x,
                                           const Pack<T>& residual) {
  Pack<T> result = coefficients.apply(x);
  if constexpr (kResidual) {
    result = result + residual;
  }
  if constexpr (kRelu) {
    result = relu(result);
  }
  return result;
}

/// Normalises a run of n values. With kStream y must be aligned for it.
template <typename T, bool kResidual, bool kRelu, bool kStream>
inline void normalize_run(const ForwardRun<T>& run, int64_t n, const PackCoefficients<T>& of_channel) {
  using P = Pack<T>;
  const PackCoefficients<T> coefficients = of_channel;  // kept in registers, as y may be anything
  const auto [x, residual, y] = run;
  constexpr int kUnroll = 4;
  int64_t i = 0;
  const auto one_pack = [&, x = x, residual = residual, y = y](int64_t at) {
    normalized_pack<T, kResidual, kRelu>(coefficients, P::load_any_order(x + at),
                                         kResidual ? P::load_any_order(residual + at) : P())
        .template store_any_order<kStream>(y + at);
  };
  for (; i + kUnroll * P::kSize <= n; i += kUnroll * P::kSize) {
    for (int u = 0; u < kUnroll; ++u) {
      one_pack(i + u * P::kSize);
    }
  }
  for (; i + P::kSize <= n; i += P::kSize) {
    one_pack(i);
  }
  if (i == n) {
    return;
  }
  normalized_pack<T, kResidual, kRelu>(coefficients, P::load(x + i, n - i),
                                       kResidual ? P::load(residual + i, n - i) : P())
      .store(y + i, n - i);
}

/// So many runs with a residual are normalised together: memory is read faster in several places at once.
constexpr size_t kResidualRuns = 4;

/// Normalises several runs of n values each.
template <typename T, bool kRelu, bool kStream>
inline void normalize_residual_runs(const std::array<ForwardRun<T>, kResidualRuns>& runs, int64_t n,
                                    const PackCoefficients<T>& of_channel) {
  using P = Pack<T>;
  constexpr int64_t kAhead = int64_t{2} * 1024 / static_cast<int64_t>(sizeof(T));
  const PackCoefficients<T> coefficients = of_channel;  // kept in registers, as y may be anything
  int64_t i = 0;
  for (; i + P::kSize <= n; i += P::kSize) {
    // All reads come before the writes: runs may lie a multiple of 4 KB apart, and a read waits for a write to an
    // address with the same last 12 bits.
    P results[kResidualRuns];
#pragma GCC unroll 4
    for (size_t r = 0; r < kResidualRuns; ++r) {
      prefetch(runs[r].residual + i + kAhead);
      results[r] = normalized_pack<T, true, kRelu>(coefficients, P::load_any_order(runs[r].x + i),
                                                   P::load_any_order(runs[r].residual + i));
    }
#pragma GCC unroll 4
    for (size_t r = 0; r < kResidualRuns; ++r) {
      results[r].template store_any_order<kStream>(runs[r].y + i);
    }
  }
  if (i == n) {
    return;
  }
  for (const auto& run : runs) {
    normalize_run<T, true, kRelu, kStream>({run.x + i, run.residual + i, run.y + i}, n - i, coefficients);
  }
}

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
