#include "ops/shared/checks.h"

#include "ops/shared/dtypes.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace momentum_bn {
void check_num_features(int64_t num_features) {
  TORCH_CHECK_VALUE(num_features >= 0, "num_features must be at least 0 (got ", num_features, ")");
}

void check_eps(double eps) {
  TORCH_CHECK_VALUE(eps > 0 && std::isfinite(eps), "eps must be positive and finite (got ", eps, ")");
}

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
  TORCH_CHECK_TYPE(has_kernels(x.scalar_type()), "x must be float32, float64, bfloat16 or float16 (got ",
                   x.scalar_type(), ")");
  TORCH_CHECK_VALUE(x.layout() == at::kStrided, "x must be a dense tensor (got layout ", x.layout(), ")");
  if (residual && residual->defined()) {
    check_same(*residual, "residual", x, "x");
  }
}

void check_same(const at::Tensor& tensor, const char* name, const at::Tensor& like, const char* like_name) {
  TORCH_CHECK_VALUE(tensor.sym_sizes() == like.sym_sizes(), name, " must have ", like_name, "'s shape ",
                    like.sym_sizes(), " (got ", tensor.sym_sizes(), ")");
  TORCH_CHECK_VALUE(tensor.scalar_type() == like.scalar_type(), name, " must have ", like_name, "'s dtype ",
                    like.scalar_type(), " (got ", tensor.scalar_type(), ")");
  TORCH_CHECK_VALUE(tensor.device() == like.device(), name, " must be on ", like_name, "'s device ", like.device(),
                    " (got ", tensor.device(), ")");
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided, name, " must be a dense tensor (got layout ", tensor.layout(),
                    ")");
}

void check_channels(const at::Tensor& x, const c10::SymInt& num_features) {
  TORCH_CHECK_VALUE(x.sym_size(1) == num_features, "expected input with ", num_features,
                    " channels in dimension 1 (got ", x.sym_size(1), " channels, input size ", x.sym_sizes(), ")");
}

void check_parameter(const at::Tensor& x, const at::Tensor& parameter, const char* name) {
  if (!parameter.defined()) {
    return;
  }
  TORCH_CHECK_VALUE(parameter.dim() == 1 && parameter.sym_size(0) == x.sym_size(1), "expected ", name, " of shape [",
                    x.sym_size(1), "], one value per channel of the input (got ", parameter.sym_sizes(),
                    ", input size ", x.sym_sizes(), ")");
  TORCH_CHECK(parameter.scalar_type() == x.scalar_type() ||
                  (at::isReducedFloatingType(x.scalar_type()) && parameter.scalar_type() == at::kFloat),
              "mixed dtype: expect ", name, " to have scalar type of Float or the input's ", x.scalar_type(), " (got ",
              parameter.scalar_type(), ")");
  TORCH_CHECK_VALUE(parameter.layout() == at::kStrided, name, " must be a dense tensor (got layout ",
                    parameter.layout(), ")");
  TORCH_CHECK(parameter.device() == x.device(), "Expected all tensors to be on the same device, but got ", name,
              " is on ", parameter.device(), ", different from the input on ", x.device());
}

void check_scalar(const at::Tensor& tensor, const char* name, std::initializer_list<at::ScalarType> dtypes,
                  c10::Device device) {
  TORCH_CHECK_VALUE(tensor.defined() && tensor.sym_numel() == 1, name, " must hold one value (got ",
                    tensor.defined() ? c10::str("shape ", tensor.sym_sizes()) : std::string("None"), ")");
  const bool has_dtype = std::find(dtypes.begin(), dtypes.end(), tensor.scalar_type()) != dtypes.end();
  TORCH_CHECK_TYPE(has_dtype, name, " must be ", c10::Join(" or ", std::vector<at::ScalarType>(dtypes)), " (got ",
                   tensor.scalar_type(), ")");
  TORCH_CHECK_VALUE(tensor.device() == device, name, " must be on the device ", device, " (got ", tensor.device(), ")");
}

void check_schedule(const at::Tensor& cur_iter, const at::Tensor& momentum) {
  check_scalar(cur_iter, "cur_iter", {at::kLong}, cur_iter.device());
  check_scalar(momentum, "momentum", {at::kDouble, at::kFloat}, cur_iter.device());
}

void check_batch_statistics(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.sym_numel() != x.sym_size(1),
                    "Expected more than 1 value per channel when training, got input size ", x.sym_sizes());
}

void check_group_statistics(const at::Tensor& x, double values_per_channel) {
  TORCH_CHECK_VALUE(values_per_channel != 1, "Expected more than 1 value per channel when training, got input size ",
                    x.sym_sizes(), ", and 1 value per channel in the whole process group");
}

void check_pairs(at::TensorList teacher, at::TensorList master, at::TensorList student, const at::Tensor& updates) {
  TORCH_CHECK_VALUE(master.size() == teacher.size() && student.size() == teacher.size(), "expected ", teacher.size(),
                    " masters and student parameters, as many as the teacher has (got ", master.size(), " and ",
                    student.size(), ")");
  check_scalar(updates, "updates", {at::kLong}, teacher.empty() ? updates.device() : teacher[0].device());
  for (size_t i = 0; i < teacher.size(); ++i) {
    TORCH_CHECK_VALUE(student[i].sym_sizes() == teacher[i].sym_sizes(), "student[", i,
                      "] must have the shape of the teacher's parameter ", teacher[i].sym_sizes(), " (got ",
                      student[i].sym_sizes(), ")");
    const bool none = master[i].sym_numel() == 0;
    TORCH_CHECK_VALUE(none || master[i].sym_sizes() == teacher[i].sym_sizes(), "master[", i,
                      "] must be empty or have the shape of the teacher's parameter ", teacher[i].sym_sizes(), " (got ",
                      master[i].sym_sizes(), ")");
    TORCH_CHECK_TYPE(none || master[i].scalar_type() == at::kFloat, "master[", i, "] must be float32 (got ",
                     master[i].scalar_type(), ")");
    const auto dtype = teacher[i].scalar_type();
    TORCH_CHECK_TYPE(none || dtype == at::kHalf || dtype == at::kBFloat16, "teacher[", i,
                     "] must be float16 or bfloat16 where it has a master (got ", dtype, ")");
    for (const auto* tensor : {&master[i], &student[i]}) {
      TORCH_CHECK_VALUE((tensor->device() == teacher[i].device() && tensor->layout() == teacher[i].layout()) ||
                            (tensor == &master[i] && none),
                        tensor == &master[i] ? "master[" : "student[", i, "] must be on the teacher's device ",
                        teacher[i].device(), " and of its layout ", teacher[i].layout(), " (got ", tensor->device(),
                        " and ", tensor->layout(), ")");
    }
  }
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
