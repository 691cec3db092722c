#pragma once

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/moments.h"

// One run of consecutive values of one channel, backward.

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// What a backward pass reads and writes; null where there is nothing to read or write.
template <typename T>
struct BackwardPointers {
  const T* dy;
  const T* x;
  const T* y;
  T* dx;
  T* dresidual;

  explicit BackwardPointers(const BackwardArgs& args)
      : dy(static_cast<const T*>(args.dy)),
        x(static_cast<const T*>(args.x)),
        y(static_cast<const T*>(args.y)),
        dx(static_cast<T*>(args.dx)),
        dresidual(static_cast<T*>(args.dresidual)) {}

  void advance(int64_t offset) {
    dy += offset;
    if (x) x += offset;
    if (y) y += offset;
    if (dx) dx += offset;
    if (dresidual) dresidual += offset;
  }
};

/// Writes dx and dresidual of runs and sums g and g * (x - center) over them.
template <typename T, bool kMask, bool kInput, bool kStream>
class BackwardRuns {
  using A = Accumulate<T>;
  using P = Pack<T>;
  using V = P::V;
  static constexpr int kPacks = 4 / P::kRegisters;

 public:
  BackwardRuns(A scale, A center) : scale_(P::all(scale)), center_(P::all(center)) {}

  /// Takes n values in. `ahead` values on from each, memory is asked for.
  void add(BackwardPointers<T> pointers, int64_t n, int64_t ahead) {
    for (int64_t i = 0; i < n; i += kMostAtOnce<T>) {
      add_some(pointers, std::min(kMostAtOnce<T>, n - i), ahead);
      pointers.advance(kMostAtOnce<T>);
    }
  }

  /// sum(g) and sum(g * (x - center))
  Sums get() const { return {g_.sum(), gx_.sum()}; }

 private:
  void add_some(const BackwardPointers<T>& p, int64_t n, int64_t ahead) {
    V g_sum[4] = {V(0), V(0), V(0), V(0)};
    V gx_sum[4] = {V(0), V(0), V(0), V(0)};
    const auto take = [&](int pack, const P& g, const P& gx) {
      for (int r = 0; r < P::kRegisters; ++r) {
        const int at = pack * P::kRegisters + r;
        g_sum[at] = g_sum[at] + g.v[r];
        if constexpr (kInput) gx_sum[at] = gx_sum[at] + gx.v[r];
      }
    };
    const auto one_pack = [&](int pack, int64_t i) {
      P g = P::load_any_order(p.dy + i);
      if constexpr (kMask) g = masked(P::load_any_order(p.y + i), g);
      P gx;
      if constexpr (kInput) gx = g * (P::load_any_order(p.x + i) - center_);
      // After all reads: dx and dresidual may be dy.
      if (p.dresidual) g.template store_any_order<kStream>(p.dresidual + i);
      if (p.dx) (g * scale_).template store_any_order<kStream>(p.dx + i);
      take(pack, g, gx);
    };
    int64_t i = 0;
    for (; i + kPacks * P::kSize <= n; i += kPacks * P::kSize) {
      for (int pack = 0; pack < kPacks; ++pack) {
        const int64_t at = i + pack * P::kSize;
        prefetch_far(p.dy + at + ahead);
        if constexpr (kInput) prefetch_far(p.x + at + ahead);
        if constexpr (kMask) prefetch_far(p.y + at + ahead);
        one_pack(pack, at);
      }
    }
    for (; i + P::kSize <= n; i += P::kSize) one_pack(0, i);
    if (i < n) {
      const int64_t rest = n - i;
      P g = P::load(p.dy + i, rest);
      if constexpr (kMask) g = masked(P::load(p.y + i, rest), g);
      P gx;
      // Beyond the end a value reads as 0, but 0 * (0 - center) is no 0 where the center is infinite.
      if constexpr (kInput) gx = (g * (P::load(p.x + i, rest) - center_)).first(rest);
      if (p.dresidual) g.store(p.dresidual + i, rest);
      if (p.dx) (g * scale_).store(p.dx + i, rest);
      take(0, g, gx);
    }
    g_.add((g_sum[0] + g_sum[1]) + (g_sum[2] + g_sum[3]));
    if constexpr (kInput) gx_.add((gx_sum[0] + gx_sum[1]) + (gx_sum[2] + gx_sum[3]));
  }

  P scale_;
  P center_;
  DoubleLanes<A> g_;
  DoubleLanes<A> gx_;
};

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
