#pragma once

#include "kernels/cpu/blend.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/moments.h"
#include "kernels/cpu/normalize_run.h"

#include <array>
#include <type_traits>

// This file takes one run of consecutive values of one channel backward.

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// The ReLU's mask comes from the signs of y, or from those that x leads to again.
enum class Mask { kNone, kFromY, kFromX };

template <Mask kMask>
using MaskType = std::integral_constant<Mask, kMask>;

/// Calls run(mask) with the mask as a type, for passes that read x.
template <typename Run>
void with_input_mask(const BackwardArgs& args, const Run& run) {
  if (!args.relu) {
    run(MaskType<Mask::kNone>());
  } else if (args.y) {
    run(MaskType<Mask::kFromY>());
  } else {
    run(MaskType<Mask::kFromX>());
  }
}

/// Calls run(mask, input) with both as types: the second tells whether x is read.
template <typename Run>
void with_mask(const BackwardArgs& args, const Run& run) {
  with_input_mask(args, [&](auto mask) {
    if constexpr (mask() != Mask::kFromX) {
      if (!args.x) {
        return run(mask, std::false_type());
      }
    }
    run(mask, std::true_type());
  });
}

/// What a backward pass reads and writes. A null pointer means that there is nothing to read or write.
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
        y(args.relu ? static_cast<const T*>(args.y) : nullptr),
        dx(static_cast<T*>(args.dx)),
        dresidual(static_cast<T*>(args.dresidual)) {}

  void advance(int64_t offset) {
    dy += offset;
    if (x) {
      x += offset;
    }
    if (y) {
      y += offset;
    }
    if (dx) {
      dx += offset;
    }
    if (dresidual) {
      dresidual += offset;
    }
  }
};

/// One pack of everything that is read.
template <typename T, Mask kMask, bool kInput>
struct BackwardPacks {
  using P = Pack<T>;
  static_assert(kMask != Mask::kFromX || kInput);

  P dy;
  P x;
  P y;

  MOMENTUM_BN_INLINE static BackwardPacks load(const BackwardPointers<T>& p, int64_t i) {
    BackwardPacks packs;
    packs.dy = P::load_any_order(p.dy + i);
    if constexpr (kInput) {
      packs.x = P::load_any_order(p.x + i);
    }
    if constexpr (kMask == Mask::kFromY) {
      packs.y = P::load_any_order(p.y + i);
    }
    return packs;
  }
  /// Loads the first `count` values, in the order of memory; the rest is 0.
  MOMENTUM_BN_INLINE static BackwardPacks load(const BackwardPointers<T>& p, int64_t i, int64_t count) {
    BackwardPacks packs;
    packs.dy = P::load(p.dy + i, count);
    if constexpr (kInput) {
      packs.x = P::load(p.x + i, count);
    }
    if constexpr (kMask == Mask::kFromY) {
      packs.y = P::load(p.y + i, count);
    }
    return packs;
  }

  /// Returns dy, but 0 where the ReLU let nothing through.
  MOMENTUM_BN_INLINE P g(const PackCoefficients<T>& forward) const {
    if constexpr (kMask == Mask::kFromY) {
      return masked(y, dy);
    }
    if constexpr (kMask == Mask::kFromX) {
      return masked(forward.apply(x), dy);
    }
    return dy;
  }
};

/// Sums g and g * (x - center) over runs, and writes dresidual and the dx of constant statistics where they are asked
/// for.
template <typename T, Mask kMask, bool kInput, bool kStream>
class BackwardRuns {
  using A = Accumulate<T>;
  using P = Pack<T>;
  using V = P::V;
  using Packs = BackwardPacks<T, kMask, kInput>;

 public:
  /// So many runs are taken in together; each is two or three in memory: dy, x and y.
  static constexpr size_t kRuns = 4;
  using Offsets = std::array<int64_t, kRuns>;

  BackwardRuns(const Channels<A>& channels, int64_t channel) : of_channel_(channels, channel) {}

  /// Takes a run of n values in.
  void add(BackwardPointers<T> pointers, int64_t n) {
    constexpr int64_t kMost = kMostGradients * static_cast<int64_t>(kRuns) * V::size();
    for (int64_t i = 0; i < n; i += kMost) {
      add_one(pointers, std::min(kMost, n - i));
      pointers.advance(kMost);
    }
  }

  /// Takes kRuns runs of n values in; each lies so far behind the pointers.
  void add_together(const BackwardPointers<T>& pointers, const Offsets& offsets, int64_t n) {
    constexpr int64_t kMost = kMostGradients * V::size();
    const int64_t in_packs = n / P::kSize * P::kSize;
    for (int64_t i = 0; i < in_packs; i += kMost) {
      add_some_together(pointers, offsets, i, std::min(i + kMost, in_packs));
    }
    if (in_packs == n) {
      return;
    }
    for (const int64_t offset : offsets) {
      BackwardPointers<T> run = pointers;
      run.advance(offset + in_packs);
      add(run, n - in_packs);
    }
  }

  /// Returns sum(g) and sum(g * (x - center)).
  Sums get() const { return {g_.sum(), gx_.sum()}; }

 private:
  /// So many gradients of each lane are added up in a register before it is flushed into double. Those of float are
  /// few: the error of their sum grows with them, and there is no other as large. Gradients of 16 bits are themselves
  /// less exact.
  static constexpr int64_t kMostGradients = std::is_same_v<T, float> ? 4 : kMostPerLane;
  /// Each run is asked for this many values in advance.
  static constexpr int64_t kAhead = int64_t{1024} / static_cast<int64_t>(sizeof(T));

  struct OfChannel {
    P scale;
    P center;
    PackCoefficients<T> forward;

    OfChannel(const Channels<A>& channels, int64_t channel)
        : scale(P::all(
              static_cast<A>(channels.weight_of(channel) * static_cast<double>(channels.statistics(channel).rstd)))),
          center(P::all(channels.statistics(channel).center)),
          forward(channels.coefficients(channel)) {}
  };

  struct Registers {
    V g[kRuns];
    V gx[kRuns];

    Registers() {
#pragma GCC unroll 4
      for (size_t r = 0; r < kRuns; ++r) {
        g[r] = gx[r] = V(0);
      }
    }
    /// With kInOne a pack goes into one register, else into neighbouring ones.
    template <bool kInOne>
    MOMENTUM_BN_INLINE void take(size_t at, const P& of_g, const P& of_gx) {
      for (size_t r = 0; r < P::kRegisters; ++r) {
        const size_t to = kInOne ? at : at + r;
        g[to] = g[to] + of_g.v[r];
        if constexpr (kInput) {
          gx[to] = gx[to] + of_gx.v[r];
        }
      }
    }
  };

  void add_one(const BackwardPointers<T>& pointers, int64_t n) {
    constexpr size_t kPacks = kRuns / P::kRegisters;
    constexpr int64_t kStep = static_cast<int64_t>(kPacks) * P::kSize;
    Registers registers;
    // These are kept in registers, as what is written may be anything.
    const BackwardPointers<T> p = pointers;
    const OfChannel of_channel = of_channel_;
    int64_t i = 0;
    const auto one_pack = [&](size_t at, int64_t of_pack) {
      write(take<false>(registers, at, Packs::load(p, of_pack), of_channel), p, of_pack, of_channel);
    };
    for (; i + kStep <= n; i += kStep) {
      for (size_t pack = 0; pack < kPacks; ++pack) {
        one_pack(pack * P::kRegisters, i + static_cast<int64_t>(pack) * P::kSize);
      }
    }
    for (; i + P::kSize <= n; i += P::kSize) {
      one_pack(0, i);
    }
    if (i < n) {
      last_values(registers, p, i, n - i);
    }
    flush(registers);
  }

  /// Takes the values [i, end) of each run in; they are whole packs.
  void add_some_together(const BackwardPointers<T>& pointers, const Offsets& offsets, int64_t i, int64_t end) {
    Registers registers;
    const BackwardPointers<T> p = pointers;
    const OfChannel of_channel = of_channel_;
    for (; i < end; i += P::kSize) {
      // All reads come before the writes: runs may lie a multiple of 4 KB apart, and a read waits for a write to an
      // address with the same last 12 bits.
      P g[kRuns];
#pragma GCC unroll 4
      for (size_t r = 0; r < kRuns; ++r) {
        const int64_t at = offsets[r] + i;
        prefetch(p.dy + at + kAhead);
        if constexpr (kInput) {
          prefetch(p.x + at + kAhead);
        }
        if constexpr (kMask == Mask::kFromY) {
          prefetch(p.y + at + kAhead);
        }
        g[r] = take<true>(registers, r, Packs::load(p, at), of_channel);
      }
#pragma GCC unroll 4
      for (size_t r = 0; r < kRuns; ++r) {
        write(g[r], p, offsets[r] + i, of_channel);
      }
    }
    flush(registers);
  }

  /// Takes a pack in and returns its g.
  template <bool kInOne>
  MOMENTUM_BN_INLINE static P take(Registers& registers, size_t at, const Packs& packs, const OfChannel& of_channel) {
    const P g = packs.g(of_channel.forward);
    P gx;
    if constexpr (kInput) {
      gx = g * (packs.x - of_channel.center);
    }
    registers.template take<kInOne>(at, g, gx);
    return g;
  }

  MOMENTUM_BN_INLINE static void write(const P& g, const BackwardPointers<T>& p, int64_t i,
                                       const OfChannel& of_channel) {
    if (p.dresidual) {
      g.template store_any_order<kStream>(p.dresidual + i);
    }
    if (p.dx) {
      (g * of_channel.scale).template store_any_order<kStream>(p.dx + i);
    }
  }

  /// Takes the `count` values from i on in, which are fewer than a pack.
  void last_values(Registers& registers, const BackwardPointers<T>& p, int64_t i, int64_t count) const {
    const auto packs = Packs::load(p, i, count);
    const P g = packs.g(of_channel_.forward);
    P gx;
    // Beyond the end a value reads as 0, but 0 * (0 - center) is no 0 where the center is infinite.
    if constexpr (kInput) {
      gx = (g * (packs.x - of_channel_.center)).first(count);
    }
    if (p.dresidual) {
      g.store(p.dresidual + i, count);
    }
    if (p.dx) {
      (g * of_channel_.scale).store(p.dx + i, count);
    }
    registers.template take<false>(0, g, gx);
  }

  void flush(Registers& registers) {
    g_.add(sum_of(registers.g));
    if constexpr (kInput) {
      gx_.add(sum_of(registers.gx));
    }
  }

  OfChannel of_channel_;
  DoubleLanes<A> g_;
  DoubleLanes<A> gx_;
};

/// Writes what a channel's sums lead to. Without x there is no second sum.
template <typename A>
GradientSums finish_sums(const BackwardArgs& args, const Channels<A>& channels, int64_t channel, const Sums& of_runs) {
  const auto saved = channels.statistics(channel);
  const auto sums = gradient_sums_of(saved, of_runs.first, of_runs.second);
  if (args.dweight) {
    static_cast<A*>(args.dweight)[channel] = static_cast<A>(sums.gx * static_cast<double>(saved.rstd));
  }
  if (args.dbias) {
    static_cast<A*>(args.dbias)[channel] = static_cast<A>(sums.g);
  }
  if (args.sums) {
    args.sums[channel] = sums.g;
    args.sums[args.shape.channels + channel] = sums.gx;
  }
  return sums;
}

/// A backward pass through the statistics has two halves: the first does all but dx, the second dx alone.
inline BackwardArgs first_half(const BackwardArgs& args) {
  BackwardArgs first = args;
  first.dx = nullptr;
  first.stream = false;  // dresidual is read again
  return first;
}

inline BackwardArgs second_half(const BackwardArgs& args) {
  BackwardArgs second = args;
  if (args.dresidual) {
    second.dy = args.dresidual;
    second.y = nullptr;
    second.relu = false;
    second.dresidual = nullptr;
  }
  return second;
}

/// Calls run(mask of the first half, mask of the second half) with both as types.
template <typename Run>
void with_halves(const BackwardArgs& first, const BackwardArgs& second, const Run& run) {
  with_input_mask(first, [&](auto mask) {
    // Where dresidual is read in the place of dy, no mask is left.
    second.relu == first.relu ? run(mask, mask) : run(mask, MaskType<Mask::kNone>());
  });
}

/// Gives the shares of one channel after the other. Most often they are those of the channel before.
template <typename A>
class SharesInOrder {
 public:
  explicit SharesInOrder(const Channels<A>& channels) : channels_(channels) {}

  ExactShares of(int64_t channel) {
    const SavedShares<A> saved = channels_.shares(channel);
    if (saved.mean_share != last_.mean_share || saved.variance_share != last_.variance_share) {
      last_ = saved;
      exact_ = exact_shares(saved);
    }
    return {static_cast<double>(saved.delta), exact_.mean_share, exact_.variance_share};
  }

 private:
  const Channels<A>& channels_;
  SavedShares<A> last_ = {0, 0, 0};
  ExactShares exact_ = {0, 0, 0};
};

/// A channel's coefficients, in all lanes.
template <typename T>
class PackInputGradient {
  using A = Accumulate<T>;
  using P = Pack<T>;

 public:
  PackInputGradient(const Channels<A>& channels, int64_t channel, const ExactShares& shares, const GradientSums& sums)
      : PackInputGradient(
            channels.statistics(channel).center, channels.coefficients(channel),
            input_gradient_coefficients(channels.statistics(channel), shares, channels.weight_of(channel), sums)) {}

  template <Mask kMask>
  MOMENTUM_BN_INLINE P apply(const BackwardPacks<T, kMask, true>& packs) const {
    return input_gradient(packs.g(forward_), packs.x - center_, scale_, offset_, deviation_scale_, rest_);
  }

 private:
  PackInputGradient(A center, const Coefficients<A>& forward, const InputGradientCoefficients<A>& backward)
      : center_(P::all(center)),
        forward_(forward),
        scale_(P::all(backward.scale)),
        offset_(P::all(backward.offset)),
        deviation_scale_(P::all(backward.deviation_scale)),
        rest_(P::all(backward.rest)) {}

  P center_;
  PackCoefficients<T> forward_;
  P scale_;
  P offset_;
  P deviation_scale_;
  P rest_;
};

/// Writes dx of a run of n values.
template <typename T, Mask kMask, bool kStream>
inline void input_gradient_run(const BackwardPointers<T>& pointers, int64_t n, const PackInputGradient<T>& of_channel) {
  using P = Pack<T>;
  using Packs = BackwardPacks<T, kMask, true>;
  constexpr int64_t kUnroll = 4;
  // These are kept in registers, as dx may be anything.
  const BackwardPointers<T> p = pointers;
  const PackInputGradient<T> coefficients = of_channel;
  int64_t i = 0;
  for (; i + kUnroll * P::kSize <= n; i += kUnroll * P::kSize) {
    P dx[kUnroll];
#pragma GCC unroll 4
    for (int64_t u = 0; u < kUnroll; ++u) {
      dx[u] = coefficients.template apply<kMask>(Packs::load(p, i + u * P::kSize));
    }
#pragma GCC unroll 4
    for (int64_t u = 0; u < kUnroll; ++u) {
      dx[u].template store_any_order<kStream>(p.dx + i + u * P::kSize);
    }
  }
  for (; i + P::kSize <= n; i += P::kSize) {
    coefficients.template apply<kMask>(Packs::load(p, i)).template store_any_order<kStream>(p.dx + i);
  }
  if (i < n) {
    coefficients.template apply<kMask>(Packs::load(p, i, n - i)).store(p.dx + i, n - i);
  }
}

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
