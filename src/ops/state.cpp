#include "ops/state.h"

#include "ops/checks.h"

#include <c10/util/Exception.h>

namespace momentum_bn {

State State::of(at::TensorList tensors) {
  if (tensors.empty()) return {};
  TORCH_CHECK_VALUE(tensors.size() == kTensors, "state must be empty or hold ", kTensors, " tensors (got ",
                    tensors.size(), ")");
  return {tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], tensors[5], tensors[6], tensors[7]};
}

std::vector<at::Tensor> State::tensors() const {
  if (!tracks()) return {};
  return {running_mean, running_var, num_batches_tracked, view_mean_sum, view_var_sum, view_count, cur_iter, momentum};
}

void State::check(const at::Tensor& x) const {
  if (!tracks()) return;
  TORCH_CHECK_VALUE(running_mean.dim() == 1, "running_mean must have one dimension (got ", running_mean.dim(), ")");
  check_channels(x, running_mean.size(0));
  check_parameter(x, running_mean, "running_mean");
  check_parameter(x, running_var, "running_var");
  check_parameter(x, view_mean_sum, "view_mean_sum");
  check_parameter(x, view_var_sum, "view_var_sum");
  check_scalar(num_batches_tracked, "num_batches_tracked", {at::kLong}, x.device());
  check_scalar(view_count, "view_count", {at::kLong}, x.device());
  check_scalar(cur_iter, "cur_iter_state", {at::kLong}, x.device());
  check_scalar(momentum, "momentum_state", {at::kDouble, at::kFloat}, x.device());
}

}  // namespace momentum_bn
