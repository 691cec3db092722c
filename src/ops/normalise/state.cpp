#include "ops/normalise/state.h"

#include "ops/shared/checks.h"

#include <c10/util/Exception.h>

namespace momentum_bn {

State State::of(at::TensorList tensors) {
  switch (tensors.size()) {
    case 0:
      return {};
    case 3:
      return {tensors[0], tensors[1], tensors[2], {}, {}, {}, {}, {}};
    case 8:
      return {tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], tensors[5], tensors[6], tensors[7]};
    default:
      TORCH_CHECK_VALUE(false, "state must hold no tensor, 3 or 8 (got ", tensors.size(), ")");
  }
}

State State::detached() const {
  State result = *this;
  for (auto* tensor : {&result.running_mean, &result.running_var, &result.num_batches_tracked, &result.view_mean_sum,
                       &result.view_var_sum, &result.view_count, &result.cur_iter, &result.momentum}) {
    if (tensor->defined()) {
      *tensor = tensor->detach();
    }
  }
  return result;
}

void State::check(const at::Tensor& x) const {
  if (!tracks()) {
    return;
  }
  TORCH_CHECK_VALUE(running_mean.dim() == 1, "running_mean must have one dimension (got ", running_mean.dim(), ")");
  check_channels(x, running_mean.sym_size(0));
  check_parameter(x, running_mean, "running_mean");
  check_parameter(x, running_var, "running_var");
  check_scalar(num_batches_tracked, "num_batches_tracked", {at::kLong}, x.device());
  if (has_schedule()) {
    check_parameter(x, view_mean_sum, "view_mean_sum");
    check_parameter(x, view_var_sum, "view_var_sum");
    check_scalar(view_count, "view_count", {at::kLong}, x.device());
    check_scalar(cur_iter, "cur_iter_state", {at::kLong}, x.device());
    check_scalar(momentum, "momentum_state", {at::kDouble, at::kFloat}, x.device());
  }
}

}  // namespace momentum_bn
