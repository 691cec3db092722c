// Compiled once per instruction set, with CPU_CAPABILITY naming it.

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/blend.h"
#include "kernels/cpu/columns.h"
#include "kernels/cpu/planes.h"

namespace momentum_bn::kernels {
namespace CPU_CAPABILITY {
namespace {

/// Planes this long are worth a loop of their own; shorter ones are columns of one long row per image.
constexpr int64_t kSmallestPlane = 256;

bool by_planes(const Shape& shape) { return shape.inner >= kSmallestPlane; }

template <typename Args, typename Run>
void for_type(const Args& args, const Run& run) {
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

void forward(const ForwardArgs& args) {
  for_type(args, [&](auto value) {
    using T = decltype(value);
    by_planes(args.shape) ? planes_forward<T>(args, true) : columns_forward<T>(args, true);
  });
}

void normalize(const ForwardArgs& args) {
  for_type(args, [&](auto value) {
    using T = decltype(value);
    by_planes(args.shape) ? planes_forward<T>(args, false) : columns_forward<T>(args, false);
  });
}

void statistics(const ForwardArgs& args) {
  ForwardArgs unblended = args;
  unblended.blend = [](void*, int64_t, int64_t) {};
  for_type(args, [&](auto value) {
    using T = decltype(value);
    by_planes(args.shape) ? planes_statistics<T>(unblended) : columns_statistics<T>(unblended);
  });
}

void backward(const BackwardArgs& args) {
  for_type(args, [&](auto value) {
    using T = decltype(value);
    by_planes(args.shape) ? planes_backward<T>(args) : columns_backward<T>(args);
  });
}

void blend(const BlendArgs& args, int64_t begin, int64_t end) {
  args.type == Type::kDouble ? ChannelBlend<double>::run(args, begin, end) : ChannelBlend<float>::run(args, begin, end);
}

}  // namespace
}  // namespace CPU_CAPABILITY

#define MOMENTUM_BN_CONCATENATE(a, b) a##b
#define MOMENTUM_BN_TABLE(capability) MOMENTUM_BN_CONCATENATE(table_, capability)
const KernelTable& MOMENTUM_BN_TABLE(CPU_CAPABILITY)();
const KernelTable& MOMENTUM_BN_TABLE(CPU_CAPABILITY)() {
  static constexpr KernelTable kTable = {CPU_CAPABILITY::forward, CPU_CAPABILITY::normalize, CPU_CAPABILITY::statistics,
                                         CPU_CAPABILITY::backward, CPU_CAPABILITY::blend};
  return kTable;
}

}  // namespace momentum_bn::kernels
