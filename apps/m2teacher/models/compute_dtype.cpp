#include "models/compute_dtype.h"

#include <ATen/ops/conv2d.h>
#include <ATen/ops/linear.h>

#include <utility>

namespace m2teacher {
namespace {

std::optional<at::ScalarType>& dtype_of_this_thread() {
  static thread_local std::optional<at::ScalarType> dtype;
  return dtype;
}

at::Tensor cast(const at::Tensor& values) {
  const std::optional<at::ScalarType> dtype = dtype_of_this_thread();
  return dtype && values.defined() ? values.to(*dtype) : values;
}

}  // namespace

ComputeDtype::ComputeDtype(std::optional<at::ScalarType> dtype)
    : before_(std::exchange(dtype_of_this_thread(), dtype)) {}
ComputeDtype::~ComputeDtype() { dtype_of_this_thread() = before_; }

at::Tensor convolve(const torch::nn::Conv2d& layer, const at::Tensor& x) {
  const auto& options = layer->options;
  return at::conv2d(cast(x), cast(layer->weight), cast(layer->bias), options.stride(),
                    std::get<torch::ExpandingArray<2>>(options.padding()), options.dilation(), options.groups());
}

at::Tensor multiply(const torch::nn::Linear& layer, const at::Tensor& x) {
  return at::linear(cast(x), cast(layer->weight), cast(layer->bias));
}

}  // namespace m2teacher
