#pragma once

#include "kernels/shape.h"
#include "ops/shared/operator.h"

#include <ATen/core/Tensor.h>

#include <initializer_list>

// This file turns torch's tensors into what the kernels of any device take: dtypes that they know, arguments as they
// read them, and results for them to write.

namespace momentum_bn {

/// Whether kernels are compiled for this dtype. torch has other floating-point dtypes, some with one byte per value.
bool has_kernels(at::ScalarType dtype);

/// @param dtype  one that has_kernels
kernels::Type kernel_type(at::ScalarType dtype);

/// The dtype in which values are normalised: float64 for float64 input, else float32.
at::ScalarType accumulate_type(at::ScalarType dtype);

/// The dtype in which statistics are merged over processes and blended: float64 where x's device has it, else float32.
at::ScalarType blend_type(const at::Tensor& x);

/// `tensor` holds one value of one of these dtypes, and is on `device`. @throws c10::ValueError, c10::TypeError
void check_scalar(const at::Tensor& tensor, const char* name, std::initializer_list<at::ScalarType> dtypes,
                  c10::Device device);

/// How many values each channel of x has, without those of other processes.
double values_per_channel(const at::Tensor& x);

/// The sizes that kernels take for x, whose values lie densely in `format`.
kernels::Shape shape_of(const at::Tensor& x, at::MemoryFormat format);

// The address of a tensor's values; null for an undefined tensor.
const void* data_or_null(const at::Tensor& tensor);
void* mutable_data_or_null(const at::Tensor& tensor);

/// The tensor itself where it lies densely in `format`, else a copy that does; undefined where there is no tensor.
at::Tensor dense(const ops::MaybeTensor& tensor, at::MemoryFormat format);

/// Whether writing x value by value could change a value of the residual that is still to be read.
bool overwrites_residual(const at::Tensor& x, const ops::MaybeTensor& residual);

/// A tensor (C) as the kernels read it: dense and in their accumulate type, a copy where the tensor is not so. data()
/// is null where there is no tensor or it is empty.
class ChannelInput {
 public:
  ChannelInput() = default;
  /// The tensor must outlive this object.
  ChannelInput(const ops::MaybeTensor& tensor, at::ScalarType accumulate);

  const void* data() const { return data_; }

 private:
  const void* data_ = nullptr;
  at::Tensor copy_;
};

/// The same for a tensor (C) that the kernels read and write. Its memory is asked for as mutable: torch then separates
/// it from copy-on-write clones, which keep their values.
class ChannelOutput {
 public:
  ChannelOutput() = default;
  /// The tensor must outlive this object.
  ChannelOutput(const at::Tensor& tensor, at::ScalarType accumulate);

  void* data() const { return data_; }
  /// Copies what the kernels wrote into the tensor, where they were given a copy of it.
  void write_back() const;

 private:
  void* data_ = nullptr;
  const at::Tensor* tensor_ = nullptr;
  at::Tensor copy_;
};

/// A result of x's shape and dtype in x's suggested memory format; its values are still to be written.
at::Tensor empty_output(const at::Tensor& x);

/// `saved` of a forward pass of x (see normalise/schemas.cpp); its values are still to be written.
at::Tensor empty_saved(const at::Tensor& x, bool detach_statistics = true);

/// The same, all zeros, for an empty x, which has no statistics.
at::Tensor zero_saved(const at::Tensor& x, bool detach_statistics = true);

/// A tensor (C) on x's device; its values are still to be written.
at::Tensor empty_per_channel(const at::Tensor& x, at::ScalarType dtype);

/// Sets the defined ones of these tensors to 0: sums over no values, such as the weight's gradient of an empty batch.
void zero_where_defined(std::initializer_list<at::Tensor> sums);

}  // namespace momentum_bn
