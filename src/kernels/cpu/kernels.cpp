// This source is compiled once per instruction set, which CPU_CAPABILITY names.

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/blend.h"
#include "kernels/cpu/columns/backward.h"
#include "kernels/cpu/columns/forward.h"
#include "kernels/cpu/planes/backward.h"
#include "kernels/cpu/planes/forward.h"

namespace momentum_bn::kernels {
namespace CPU_CAPABILITY {
namespace {

/// Planes this long are worth a loop of their own; shorter ones are columns of one long row per image.
constexpr int64_t kSmallestPlane = 256;

bool by_planes(const Shape& shape) { return shape.inner >= kSmallestPlane; }

template <typename Args, typename Run>
void for_type(const Args& args, const Run& run) {
  // NOLINTNEXTLINE(bugprone-branch-clone): the types differ
  switch (args.type) {
    case Type::kFloat:
      return run(float());
    case Type::kDouble:
      return run(double());
    case Type::kBFloat16:
      return run(c10::BFloat16());
    case Type::kHalf:
      return run(c10::Half());
  }
}

void statistics(const StatisticsArgs& args) {
  for_type(args, [&](auto value) {
    using T = decltype(value);
    by_planes(args.shape) ? planes_statistics<T>(args) : columns_statistics<T>(args);
  });
}

template <typename T>
void normalize_after(const ForwardArgs& args, const MomentsSink<Accumulate<T>>* sink) {
  by_planes(args.shape) ? planes_forward<T>(args, sink) : columns_forward<T>(args, sink);
}

void normalize(const ForwardArgs& args) {
  for_type(args, [&](auto value) { normalize_after<decltype(value)>(args, nullptr); });
}

void forward(const ForwardArgs& args) {
  for_type(args, [&](auto value) {
    using T = decltype(value);
    using A = Accumulate<T>;
    if (args.statistics_given) {
      ChannelBlend<A>::run(args, args.mean, args.m2, 0, args.shape.channels);
      if (args.shape.values() > 0) {
        normalize_after<T>(args, nullptr);
      }
      return;
    }
    const Scratch<double> mean(args.mean ? 0 : args.shape.channels);
    const Scratch<double> m2(args.m2 ? 0 : args.shape.channels);
    const MomentsSink<A> sink = {args.mean ? args.mean : mean.get(), args.m2 ? args.m2 : m2.get(), &args};
    normalize_after<T>(args, &sink);
  });
}

void backward(const BackwardArgs& args) {
  for_type(args, [&](auto value) {
    using T = decltype(value);
    by_planes(args.shape) ? planes_backward<T>(args) : columns_backward<T>(args);
  });
}

void backward_through_statistics(const BackwardArgs& args) {
  for_type(args, [&](auto value) {
    using T = decltype(value);
    by_planes(args.shape) ? planes_backward_through_statistics<T>(args) : columns_backward_through_statistics<T>(args);
  });
}

void gradient_sums(const BackwardArgs& args) { backward(first_half(args)); }

void gradient_of_input(const BackwardArgs& args) {
  for_type(args, [&](auto value) {
    using T = decltype(value);
    by_planes(args.shape) ? planes_gradient_of_input<T>(args) : columns_gradient_of_input<T>(args);
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY

#define MOMENTUM_BN_CONCATENATE(a, b) a##b
#define MOMENTUM_BN_TABLE(capability) MOMENTUM_BN_CONCATENATE(table_, capability)
const KernelTable& MOMENTUM_BN_TABLE(CPU_CAPABILITY)();
const KernelTable& MOMENTUM_BN_TABLE(CPU_CAPABILITY)() {
  static constexpr KernelTable kTable = {CPU_CAPABILITY::statistics,
                                         CPU_CAPABILITY::forward,
                                         CPU_CAPABILITY::normalize,
                                         CPU_CAPABILITY::backward,
                                         CPU_CAPABILITY::backward_through_statistics,
                                         CPU_CAPABILITY::gradient_sums,
                                         CPU_CAPABILITY::gradient_of_input};
  return kTable;
}

}  // namespace momentum_bn::kernels
