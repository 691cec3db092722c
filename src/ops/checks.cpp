#include "ops/checks.h"

#include <c10/util/Exception.h>
#include <torch/csrc/autograd/graph_task.h>

namespace momentum_bn {

void check_eps(double eps) { TORCH_CHECK_VALUE(eps > 0, "eps must be positive (got ", eps, ")"); }

void check_momentum(std::optional<double> momentum) {
  TORCH_CHECK_VALUE(!momentum || (*momentum >= 0 && *momentum <= 1), "momentum must be None or in [0, 1] (got ",
                    *momentum, ")");
}

void check_total_iters(int64_t total_iters) {
  TORCH_CHECK_VALUE(total_iters >= 1, "total_iters must be at least 1 (got ", total_iters, ")");
}

void check_views_per_update(int64_t views_per_update) {
  TORCH_CHECK_VALUE(views_per_update >= 1, "views_per_update must be at least 1 (got ", views_per_update, ")");
}

void check_cur_iter(int64_t cur_iter) {
  TORCH_CHECK_VALUE(cur_iter >= 0, "cur_iter must be at least 0 (got ", cur_iter, ")");
}

void check_param_momentum(double param_momentum) {
  TORCH_CHECK_VALUE(param_momentum >= 0 && param_momentum <= 1, "param_momentum must be in [0, 1] (got ",
                    param_momentum, ")");
}

void check_input(const at::Tensor& x, const std::optional<at::Tensor>& residual) {
  TORCH_CHECK_VALUE(x.dim() >= 2, "expected at least 2D input (got ", x.dim(), "D input)");
  TORCH_CHECK_TYPE(at::isFloatingType(x.scalar_type()) && !at::isFloat8Type(x.scalar_type()),
                   "x must be float32, float64, bfloat16 or float16 (got ", x.scalar_type(), ")");
  if (!residual || !residual->defined()) return;
  TORCH_CHECK_VALUE(residual->sym_sizes() == x.sym_sizes(), "residual must have x's shape ", x.sym_sizes(), " (got ",
                    residual->sym_sizes(), ")");
  TORCH_CHECK_VALUE(residual->scalar_type() == x.scalar_type(), "residual must have x's dtype ", x.scalar_type(),
                    " (got ", residual->scalar_type(), ")");
  TORCH_CHECK_VALUE(residual->device() == x.device(), "residual must be on x's device ", x.device(), " (got ",
                    residual->device(), ")");
}

void check_channels(const at::Tensor& x, int64_t num_features) {
  TORCH_CHECK_VALUE(x.sym_size(1) == num_features, "expected input with ", num_features,
                    " channels in dimension 1 (got ", x.sym_size(1), " channels, input size ", x.sym_sizes(), ")");
}

void check_parameter(const at::Tensor& x, const at::Tensor& parameter, const char* name) {
  if (!parameter.defined()) return;
  TORCH_CHECK_VALUE(parameter.dim() == 1 && parameter.sym_size(0) == x.sym_size(1), "expected ", name, " of shape [",
                    x.sym_size(1), "], one value per channel of the input (got ", parameter.sym_sizes(),
                    ", input size ", x.sym_sizes(), ")");
  TORCH_CHECK(parameter.scalar_type() == x.scalar_type() ||
                  (at::isReducedFloatingType(x.scalar_type()) && parameter.scalar_type() == at::kFloat),
              "mixed dtype: expect ", name, " to have scalar type of Float or the input's ", x.scalar_type(), " (got ",
              parameter.scalar_type(), ")");
  TORCH_CHECK(parameter.device() == x.device(), "Expected all tensors to be on the same device, but got ", name,
              " is on ", parameter.device(), ", different from the input on ", x.device());
}

void check_batch_statistics(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.sym_numel() != x.sym_size(1),
                    "Expected more than 1 value per channel when training, got input size ", x.sym_sizes());
}

void check_group_statistics(const at::Tensor& x, double values_per_channel) {
  TORCH_CHECK_VALUE(values_per_channel != 1, "Expected more than 1 value per channel when training, got input size ",
                    x.sym_sizes(), ", and 1 value per channel in the whole process group");
}

void check_pairs(at::TensorList teacher, at::TensorList master, at::TensorList student) {
  TORCH_CHECK_VALUE(master.size() == teacher.size() && student.size() == teacher.size(), "expected ", teacher.size(),
                    " masters and student parameters, as many as the teacher has (got ", master.size(), " and ",
                    student.size(), ")");
}

void check_not_recomputing() {
  TORCH_CHECK_VALUE(
      torch::autograd::get_current_graph_task_id() == -1,
      "Momentum BatchNorm ran a training forward inside a backward pass, as torch.utils.checkpoint does when it "
      "recomputes: its state would be updated twice and the gradients would be wrong. Keep its output instead of "
      "recomputing it: torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=...) with "
      "create_selective_checkpoint_contexts and a policy that returns CheckpointPolicy.MUST_SAVE for "
      "torch.ops.momentum_bn._forward_train.default.");
}

}  // namespace momentum_bn
