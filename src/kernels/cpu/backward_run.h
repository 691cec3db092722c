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

 public:
  /// Runs that are taken in together: each is two or three in memory, dy, x and y.
  static constexpr int kRuns = 4;

  BackwardRuns(A scale, A center) : scale_(P::all(scale)), center_(P::all(center)) {}

  /// Takes a run of n values in.
  void add(BackwardPointers<T> pointers, int64_t n) {
    for (int64_t i = 0; i < n; i += kMostAtOnce<T>) {
      add_one(pointers, std::min(kMostAtOnce<T>, n - i));
      pointers.advance(kMostAtOnce<T>);
    }
  }

  /// Takes kRuns of n values in, each `stride` on from the one before.
  void add_together(const BackwardPointers<T>& pointers, int64_t stride, int64_t n) {
    constexpr int64_t kMost = kMostPerLane * V::size();
    std::array<BackwardPointers<T>, kRuns> runs = {pointers, pointers, pointers, pointers};
    for (size_t r = 0; r < runs.size(); ++r) runs[r].advance(static_cast<int64_t>(r) * stride);
    const int64_t in_packs = n / P::kSize * P::kSize;
    for (int64_t i = 0; i < in_packs; i += kMost) add_some_together(runs, i, std::min(i + kMost, in_packs));
    if (in_packs == n) return;
    for (auto& run : runs) {
      run.advance(in_packs);
      add(run, n - in_packs);
    }
  }

  /// sum(g) and sum(g * (x - center))
  Sums get() const { return {g_.sum(), gx_.sum()}; }

 private:
  /// How far in advance, in values, each run is asked for.
  static constexpr int64_t kAhead = int64_t{1024} / static_cast<int64_t>(sizeof(T));

  struct Registers {
    V g[kRuns];
    V gx[kRuns];

    Registers() {
#pragma GCC unroll 4
      for (int r = 0; r < kRuns; ++r) g[r] = gx[r] = V(0);
    }
    /// kInOne: into one register, else into neighbouring ones.
    template <bool kInOne>
    void take(int at, const P& of_g, const P& of_gx) {
      for (int r = 0; r < P::kRegisters; ++r) {
        const int to = kInOne ? at : at + r;
        g[to] = g[to] + of_g.v[r];
        if constexpr (kInput) gx[to] = gx[to] + of_gx.v[r];
      }
    }
  };

  void add_one(const BackwardPointers<T>& p, int64_t n) {
    constexpr int kPacks = kRuns / P::kRegisters;
    Registers registers;
    int64_t i = 0;
    for (; i + kPacks * P::kSize <= n; i += kPacks * P::kSize) {
      for (int pack = 0; pack < kPacks; ++pack) {
        one_pack(registers, pack * P::kRegisters, p, i + pack * P::kSize);
      }
    }
    for (; i + P::kSize <= n; i += P::kSize) one_pack(registers, 0, p, i);
    if (i < n) last_values(registers, 0, p, i, n - i);
    empty(registers);
  }

  /// Values [i, end) of each run, in whole packs.
  void add_some_together(const std::array<BackwardPointers<T>, kRuns>& runs, int64_t i, int64_t end) {
    Registers registers;
    for (; i < end; i += P::kSize) {
      // All reads before the writes: runs may lie a multiple of 4 KB apart, and a read waits for a write to an address
      // with the same last 12 bits.
      P g[kRuns];
#pragma GCC unroll 4
      for (int r = 0; r < kRuns; ++r) {
        const BackwardPointers<T>& p = runs[static_cast<size_t>(r)];
        prefetch_far(p.dy + i + kAhead);
        if constexpr (kInput) prefetch_far(p.x + i + kAhead);
        if constexpr (kMask) prefetch_far(p.y + i + kAhead);
        g[r] = read_pack<true>(registers, r, p, i);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRuns; ++r) write_pack(g[r], runs[static_cast<size_t>(r)], i);
    }
    empty(registers);
  }

  void one_pack(Registers& registers, int at, const BackwardPointers<T>& p, int64_t i) const {
    write_pack(read_pack<false>(registers, at, p, i), p, i);
  }

  /// Takes a pack in and returns its g.
  template <bool kInOne>
  P read_pack(Registers& registers, int at, const BackwardPointers<T>& p, int64_t i) const {
    P g = P::load_any_order(p.dy + i);
    if constexpr (kMask) g = masked(P::load_any_order(p.y + i), g);
    P gx;
    if constexpr (kInput) gx = g * (P::load_any_order(p.x + i) - center_);
    registers.template take<kInOne>(at, g, gx);
    return g;
  }

  void write_pack(const P& g, const BackwardPointers<T>& p, int64_t i) const {
    if (p.dresidual) g.template store_any_order<kStream>(p.dresidual + i);
    if (p.dx) (g * scale_).template store_any_order<kStream>(p.dx + i);
  }

  /// The `count` values from i on, fewer than a pack.
  void last_values(Registers& registers, int at, const BackwardPointers<T>& p, int64_t i, int64_t count) const {
    P g = P::load(p.dy + i, count);
    if constexpr (kMask) g = masked(P::load(p.y + i, count), g);
    P gx;
    // Beyond the end a value reads as 0, but 0 * (0 - center) is no 0 where the center is infinite.
    if constexpr (kInput) gx = (g * (P::load(p.x + i, count) - center_)).first(count);
    if (p.dresidual) g.store(p.dresidual + i, count);
    if (p.dx) (g * scale_).store(p.dx + i, count);
    registers.template take<false>(at, g, gx);
  }

  void empty(Registers& registers) {
    g_.add(sum_of(registers.g));
    if constexpr (kInput) gx_.add(sum_of(registers.gx));
  }

  P scale_;
  P center_;
  DoubleLanes<A> g_;
  DoubleLanes<A> gx_;
};

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
