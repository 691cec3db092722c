#pragma once

#include <ATen/core/Tensor.h>

namespace momentum_bn::cpu {

/// A result that is still to be written.
struct FreshOutput {
  at::Tensor tensor;
  /// Whether it is large and its memory was written before.
  bool warm;
};

/// Returns a dense result like x, in x's suggested memory format. Large ones take kept memory: see
/// <momentum_bn/memory.h>.
FreshOutput fresh_output(const at::Tensor& x);

}  // namespace momentum_bn::cpu
