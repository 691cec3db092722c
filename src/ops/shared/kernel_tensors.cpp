#include "ops/shared/kernel_tensors.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <vector>

namespace momentum_bn {

bool has_kernels(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
}

kernels::Type kernel_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return kernels::Type::kFloat;
    case at::kDouble:
      return kernels::Type::kDouble;
    case at::kBFloat16:
      return kernels::Type::kBFloat16;
    case at::kHalf:
      return kernels::Type::kHalf;
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernels for ", dtype);
  }
}

at::ScalarType accumulate_type(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

at::ScalarType blend_type(const at::Tensor& x) { return x.device().is_mps() ? at::kFloat : at::kDouble; }

void check_scalar(const at::Tensor& tensor, const char* name, std::initializer_list<at::ScalarType> dtypes,
                  c10::Device device) {
  TORCH_CHECK_VALUE(tensor.defined() && tensor.sym_numel() == 1, name, " must hold one value (got ",
                    tensor.defined() ? c10::str("shape ", tensor.sym_sizes()) : std::string("None"), ")");
  const bool has_dtype = std::find(dtypes.begin(), dtypes.end(), tensor.scalar_type()) != dtypes.end();
  TORCH_CHECK_TYPE(has_dtype, name, " must be ", c10::Join(" or ", std::vector<at::ScalarType>(dtypes)), " (got ",
                   tensor.scalar_type(), ")");
  TORCH_CHECK_VALUE(tensor.device() == device, name, " must be on the device ", device, " (got ", tensor.device(), ")");
}

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

at::Tensor empty_output(const at::Tensor& x) { return at::empty_like(x, x.options(), x.suggest_memory_format()); }

at::Tensor empty_saved(const at::Tensor& x, bool detach_statistics) {
  const int64_t rows = detach_statistics ? 3 : 6;
  return at::empty_symint({rows, x.sym_size(1)}, x.options().dtype(accumulate_type(x.scalar_type())));
}

at::Tensor zero_saved(const at::Tensor& x, bool detach_statistics) { return empty_saved(x, detach_statistics).zero_(); }

at::Tensor empty_per_channel(const at::Tensor& x, at::ScalarType dtype) {
  return at::empty_symint({x.sym_size(1)}, x.options().dtype(dtype));
}

void zero_where_defined(std::initializer_list<at::Tensor> sums) {
  for (const auto& sum : sums) {
    if (sum.defined()) {
      sum.zero_();
    }
  }
}

}  // namespace momentum_bn
