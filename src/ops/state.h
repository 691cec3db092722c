#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace momentum_bn {

/// The tensors of a layer that tracks, in the operators' order. Undefined tensors where it does not track.
/// A plain struct, so that autograd does not take them for inputs.
struct State {
  at::Tensor running_mean;         // (C)
  at::Tensor running_var;          // (C)
  at::Tensor num_batches_tracked;  // (), int64
  at::Tensor view_mean_sum;        // (C)
  at::Tensor view_var_sum;         // (C)
  at::Tensor view_count;           // (), int64
  at::Tensor cur_iter;             // (), int64
  at::Tensor momentum;             // (), float64 or float32; negative: cumulative average

  static constexpr size_t kTensors = 8;

  /// @throws c10::ValueError unless `tensors` is empty or holds all of them
  static State of(at::TensorList tensors);
  std::vector<at::Tensor> tensors() const;
  bool tracks() const { return running_mean.defined(); }
  /// Shapes, dtypes and devices fit x. Changes nothing.
  void check(const at::Tensor& x) const;
};

}  // namespace momentum_bn
