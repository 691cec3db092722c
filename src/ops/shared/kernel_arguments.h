#pragma once

#include "kernels/shape.h"
#include "ops/shared/operator.h"

#include <ATen/core/Tensor.h>

// Tensors as kernels take them, on any device: dense values, and arrays of channels in the kernels' own dtype.

namespace momentum_bn {

/// Of x alone.
double values_per_channel(const at::Tensor& x);

/// x's values as the kernels see them, where they lie densely in `format`.
kernels::Shape shape_of(const at::Tensor& x, at::MemoryFormat format);

const void* data_or_null(const at::Tensor& tensor);
void* mutable_data_or_null(const at::Tensor& tensor);

/// Undefined where there is none.
at::Tensor dense(const ops::MaybeTensor& tensor, at::MemoryFormat format);

/// Whether writing x value by value could change a value of the residual that is still to be read.
bool overwrites_residual(const at::Tensor& x, const ops::MaybeTensor& residual);

/// A tensor (C) as the kernels read it: dense and in their accumulate type. Null where there is none or it is empty.
class ChannelInput {
 public:
  ChannelInput() = default;
  /// The tensor must outlive this.
  ChannelInput(const ops::MaybeTensor& tensor, at::ScalarType accumulate);

  const void* data() const { return data_; }

 private:
  const void* data_ = nullptr;
  at::Tensor copy_;
};

/// A tensor (C) as the kernels read and write it, likewise. It is asked for as mutable, so that a copy-on-write clone
/// of it, or what it is a clone of, keeps its values.
class ChannelOutput {
 public:
  ChannelOutput() = default;
  /// The tensor must outlive this.
  ChannelOutput(const at::Tensor& tensor, at::ScalarType accumulate);

  void* data() const { return data_; }
  /// Hands what the kernels wrote to the tensor, where they were given a copy.
  void write_back() const;

 private:
  void* data_ = nullptr;
  const at::Tensor* tensor_ = nullptr;
  at::Tensor copy_;
};

}  // namespace momentum_bn
