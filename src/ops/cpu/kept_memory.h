#pragma once

#include <ATen/core/Tensor.h>

namespace momentum_bn::cpu {

/// A result that is still to be written.
struct FreshOutput {
  at::Tensor tensor;
  /// Large, and its memory was written before.
  bool warm;
};

/// Dense, like x, in its suggested memory format; large ones in kept memory (see <momentum_bn/memory.h>).
FreshOutput fresh_output(const at::Tensor& x);

}  // namespace momentum_bn::cpu
