#include "ops/shared/kernel_arguments.h"

#include <ATen/MemoryOverlap.h>

namespace momentum_bn {

double values_per_channel(const at::Tensor& x) {
  return static_cast<double>(x.numel()) / static_cast<double>(x.size(1));
}

kernels::Shape shape_of(const at::Tensor& x, at::MemoryFormat format) {
  if (x.numel() == 0) {
    return {0, x.size(1), 1};
  }
  const int64_t spatial = x.numel() / (x.size(0) * x.size(1));
  if (format == at::MemoryFormat::Contiguous) {
    return {x.size(0), x.size(1), spatial};
  }
  return {x.size(0) * spatial, x.size(1), 1};
}

const void* data_or_null(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }

void* mutable_data_or_null(const at::Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; }

at::Tensor dense(const ops::MaybeTensor& tensor, at::MemoryFormat format) {
  return tensor && tensor->defined() ? tensor->contiguous(format) : at::Tensor();
}

bool overwrites_residual(const at::Tensor& x, const ops::MaybeTensor& residual) {
  if (!residual || !residual->defined()) {
    return false;
  }
  const auto overlap = at::get_overlap_status(x, *residual);
  return overlap != at::MemOverlapStatus::No && overlap != at::MemOverlapStatus::Full;
}

namespace {

bool is_array(const at::Tensor& tensor, at::ScalarType accumulate) {
  return tensor.scalar_type() == accumulate && tensor.is_contiguous();
}

at::Tensor copied_as_array(const at::Tensor& tensor, at::ScalarType accumulate) {
  return tensor.to(accumulate, /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous);
}

}  // namespace

ChannelInput::ChannelInput(const ops::MaybeTensor& tensor, at::ScalarType accumulate) {
  if (!tensor || !tensor->defined() || tensor->numel() == 0) {
    return;
  }
  if (!is_array(*tensor, accumulate)) {
    copy_ = copied_as_array(*tensor, accumulate);
  }
  data_ = (copy_.defined() ? copy_ : *tensor).const_data_ptr();
}

ChannelOutput::ChannelOutput(const at::Tensor& tensor, at::ScalarType accumulate) {
  if (!tensor.defined() || tensor.numel() == 0) {
    return;
  }
  if (!is_array(tensor, accumulate)) {
    tensor_ = &tensor;
    copy_ = copied_as_array(tensor, accumulate);
  }
  data_ = (copy_.defined() ? copy_ : tensor).mutable_data_ptr();
}

void ChannelOutput::write_back() const {
  if (tensor_) {
    tensor_->copy_(copy_);
  }
}

}  // namespace momentum_bn
