#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace momentum_bn {

/// The tensors of `state` (see schemas.cpp). Undefined tensors for what the layer does not have.
/// It is a plain struct, so that autograd does not take them for inputs.
struct State {
  at::Tensor running_mean;         // (C)
  at::Tensor running_var;          // (C)
  at::Tensor num_batches_tracked;  // (), int64
  // Of Momentum BatchNorm alone.
  at::Tensor view_mean_sum;  // (C)
  at::Tensor view_var_sum;   // (C)
  at::Tensor view_count;     // (), int64
  at::Tensor cur_iter;       // (), int64
  at::Tensor momentum;       // (), float64 or float32; negative: cumulative average

  /// @throws c10::ValueError for a number of tensors that is none of those in schemas.cpp
  static State of(at::TensorList tensors);

  bool tracks() const { return running_mean.defined(); }
  /// Whether it is Momentum BatchNorm's.
  bool has_schedule() const { return momentum.defined(); }

  /// The same tensors without gradients, for operations that change them.
  State detached() const;
  /// Shapes, dtypes and devices fit x. Changes nothing.
  void check(const at::Tensor& x) const;
};

}  // namespace momentum_bn
