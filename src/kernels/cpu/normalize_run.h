#pragma once

#include "kernels/cpu/pack.h"

// One run of consecutive values, forward and backward. The coefficients come from a source: one value for all
// (`OneChannel`, a plane) or one for each position (`EachColumn`, a row).

namespace momentum_bn::kernels::CPU_CAPABILITY {

template <typename T>
struct OneChannel {
  Pack<T> value;
  explicit OneChannel(Accumulate<T> v) : value(Pack<T>::all(v)) {}
  Pack<T> at(int64_t) const { return value; }
};

template <typename T>
struct EachColumn {
  const Accumulate<T>* values;
  Pack<T> at(int64_t i) const { return Pack<T>::load_wide(values + i); }
};

template <typename Source>
struct Coefficients {
  Source center;
  Source scale;
  Source shift;
};

template <typename T, bool kResidual, bool kRelu, typename Source>
inline void normalize_run(const T* x, const T* residual, T* y, int64_t n, const Coefficients<Source>& c,
                          const T* ahead) {
  using P = Pack<T>;
  const auto compute = [&](int64_t i, const P& values, const P& added) {
    P result = multiply_add(values - c.center.at(i), c.scale.at(i), c.shift.at(i));
    if constexpr (kResidual) result = result + added;
    if constexpr (kRelu) result = relu(result);
    return result;
  };
  constexpr int kUnroll = 4;
  int64_t i = 0;
  for (; i + kUnroll * P::kSize <= n; i += kUnroll * P::kSize) {
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = i + u * P::kSize;
      if (ahead) __builtin_prefetch(ahead + at);
      compute(at, P::load(x + at), kResidual ? P::load(residual + at) : P()).store(y + at);
    }
  }
  for (; i + P::kSize <= n; i += P::kSize) {
    compute(i, P::load(x + i), kResidual ? P::load(residual + i) : P()).store(y + i);
  }
  if (i < n) {
    compute(i, P::load(x + i, n - i), kResidual ? P::load(residual + i, n - i) : P()).store(y + i, n - i);
  }
}

/// What a backward run reads and writes; null where there is nothing to read or write.
template <typename T>
struct BackwardRun {
  const T* dy;
  const T* x;
  const T* y;
  T* dx;
  T* dresidual;

  BackwardRun from(int64_t offset) const {
    return {dy + offset, x ? x + offset : nullptr, y ? y + offset : nullptr, dx ? dx + offset : nullptr,
            dresidual ? dresidual + offset : nullptr};
  }
};

/// Independent sums that a run is spread over, so that one addition need not wait for the last.
constexpr int kLanes = 4;

/// sum(lane, i, g, g * (x - center)) is called for each pack of the run.
template <typename T, typename Source, typename Sum>
inline void backward_run(const BackwardRun<T>& run, int64_t n, const Source& scale, const Source& center,
                         const Sum& sum) {
  using P = Pack<T>;
  const auto compute = [&](int64_t i, const auto& load, const auto& store, const auto& add) {
    P g = load(run.dy + i);
    if (run.y) g = where_positive(load(run.y + i), g);
    const P gx = run.x ? g * (load(run.x + i) - center.at(i)) : P::all(0);
    // After all reads: dx and dresidual may be dy.
    if (run.dresidual) store(g, run.dresidual + i);
    if (run.dx) store(g * scale.at(i), run.dx + i);
    add(g, gx);
  };
  const auto load = [](const T* from) { return P::load(from); };
  const auto store = [](const P& values, T* to) { values.store(to); };
  int64_t i = 0;
  for (; i + kLanes * P::kSize <= n; i += kLanes * P::kSize) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t at = i + lane * P::kSize;
      compute(at, load, store, [&](const P& g, const P& gx) { sum(lane, at, g, gx); });
    }
  }
  for (; i + P::kSize <= n; i += P::kSize) {
    compute(i, load, store, [&](const P& g, const P& gx) { sum(0, i, g, gx); });
  }
  if (i == n) return;
  const int64_t rest = n - i;
  compute(
      i, [rest](const T* from) { return P::load(from, rest); },
      [rest](const P& values, T* to) { values.store(to, rest); },
      [&](const P& g, const P& gx) {
        Accumulate<T> g_values[P::kSize];
        Accumulate<T> gx_values[P::kSize];
        g.store_wide(g_values);
        gx.store_wide(gx_values);
        // Beyond the end a value reads as 0, but 0 * (0 - center) is no 0 where the center is infinite.
        for (int64_t k = rest; k < P::kSize; ++k) g_values[k] = gx_values[k] = 0;
        sum(0, i, P::load_wide(g_values), P::load_wide(gx_values));
      });
}

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
