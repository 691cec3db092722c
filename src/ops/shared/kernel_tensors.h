#pragma once

#include "kernels/shape.h"
#include "ops/shared/operator.h"

#include <ATen/core/Tensor.h>

#include <initializer_list>

// Tensors between torch and the kernels of any device: dtypes that kernels know, arguments as kernels read them,
// results as they write them.

namespace momentum_bn {

/// Whether kernels are compiled for this dtype. torch has other floating-point ones, some of one byte a value.
bool has_kernels(at::ScalarType dtype);

/// @param dtype  one that has_kernels
kernels::Type kernel_type(at::ScalarType dtype);

/// The dtype in which values are normalised: float64 for float64 input, else float32.
at::ScalarType accumulate_type(at::ScalarType dtype);

/// The dtype of statistics that are merged and blended: float64 where x's device has it.
at::ScalarType blend_type(const at::Tensor& x);

/// `tensor` holds one value of one of these dtypes, and is on `device`. @throws c10::ValueError, c10::TypeError
void check_scalar(const at::Tensor& tensor, const char* name, std::initializer_list<at::ScalarType> dtypes,
                  c10::Device device);

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

/// A result like x, in its suggested memory format, still to be written.
at::Tensor empty_output(const at::Tensor& x);

/// `saved` of a forward pass of x (see normalise/schemas.cpp), still to be written.
at::Tensor empty_saved(const at::Tensor& x, bool detach_statistics = true);

/// The same where x is empty: there are no statistics.
at::Tensor zero_saved(const at::Tensor& x, bool detach_statistics = true);

/// (C) on x's device.
at::Tensor empty_per_channel(const at::Tensor& x, at::ScalarType dtype);

/// Does the gradients of weight and bias to come from sums over no values.
void zero_where_defined(std::initializer_list<at::Tensor> sums);

}  // namespace momentum_bn
