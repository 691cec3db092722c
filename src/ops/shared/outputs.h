#pragma once

#include <ATen/core/Tensor.h>

// Results of the operators, still to be written.

namespace momentum_bn {

/// Rows of `saved`: see normalise/schemas.cpp.
constexpr int64_t kSavedRows = 3;
constexpr int64_t kSavedRowsThroughStatistics = 6;

/// Like x, in its suggested memory format.
at::Tensor empty_output(const at::Tensor& x);

/// `saved` of a forward pass of x.
at::Tensor empty_saved(const at::Tensor& x, bool detach_statistics = true);

/// The same where x is empty: there are no statistics.
at::Tensor zero_saved(const at::Tensor& x, bool detach_statistics = true);

/// (C) on x's device.
at::Tensor empty_per_channel(const at::Tensor& x, at::ScalarType dtype);

/// Does the gradients of weight and bias to come from sums over no values.
void zero_where_defined(std::initializer_list<at::Tensor> sums);

}  // namespace momentum_bn
