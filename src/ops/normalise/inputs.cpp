#include "ops/normalise/inputs.h"

#include "ops/normalise/options.h"
#include "ops/shared/kernel_tensors.h"

#include <ATen/MemoryOverlap.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace momentum_bn {
namespace {

bool given(const ops::MaybeTensor& tensor) { return tensor && tensor->defined(); }

void check_affine(const at::Tensor& x, const ops::MaybeTensor& weight, const ops::MaybeTensor& bias) {
  if (weight) {
    check_parameter(x, *weight, "weight");
  }
  if (bias) {
    check_parameter(x, *bias, "bias");
  }
}

/// Whether two elements of a tensor may lie in one place. It is sure that they do not where each dimension, from the
/// smallest stride on, steps over all that those before it reach.
bool may_overlap_itself(const at::Tensor& tensor) {
  switch (at::has_internal_overlap(tensor)) {
    case at::MemOverlap::No:
      return false;
    case at::MemOverlap::Yes:
      return true;
    case at::MemOverlap::TooHard:
      break;
  }
  if (tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
    return false;  // of a graph that is traced; the kernel asks again
  }
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride and size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) == 0) {
      return false;
    }
    dimensions.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t reached = 0;
  for (const auto& [stride, size] : dimensions) {
    if (size > 1 && stride <= reached) {
      return true;
    }
    reached += (size - 1) * stride;
  }
  return false;
}

/// An array of the state fits x; as it is written to, its elements lie apart from one another and from x.
void check_array(const at::Tensor& x, const at::Tensor& tensor, const char* name) {
  check_parameter(x, tensor, name);
  check_writable(tensor, name);
  const bool share = x.has_storage() && tensor.has_storage() && tensor.is_alias_of(x) &&
                     at::get_overlap_status(x, tensor) != at::MemOverlapStatus::No;
  TORCH_CHECK(!share, name, " must not share memory with x, as it is written to: clone() it");
}

/// A batch that normalises itself has more than one value per channel.
void check_batch_statistics(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.sym_numel() != x.sym_size(1),
                    "Expected more than 1 value per channel when training, got input size ", x.sym_sizes());
}

/// Recomputation inside a backward pass would update the state twice.
void check_not_recomputing() {
  TORCH_CHECK_VALUE(
      torch::autograd::get_current_graph_task_id() == -1,
      "Momentum BatchNorm ran a training forward inside a backward pass, as torch.utils.checkpoint does when it "
      "recomputes: its state would be updated twice and the gradients would be wrong. Keep its output instead of "
      "recomputing it: torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=...) with "
      "create_selective_checkpoint_contexts and a policy that returns CheckpointPolicy.MUST_SAVE for "
      "torch.ops.momentum_bn._forward_train.default.");
}

}  // namespace

void check_input(const at::Tensor& x, const ops::MaybeTensor& residual) {
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

void check_group_statistics(const at::Tensor& x, double values_per_channel) {
  TORCH_CHECK_VALUE(values_per_channel != 1, "Expected more than 1 value per channel when training, got input size ",
                    x.sym_sizes(), ", and 1 value per channel in the whole process group");
}

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
  check_array(x, running_mean, "running_mean");
  check_array(x, running_var, "running_var");
  check_scalar(num_batches_tracked, "num_batches_tracked", {at::kLong}, x.device());
  if (has_schedule()) {
    check_array(x, view_mean_sum, "view_mean_sum");
    check_array(x, view_var_sum, "view_var_sum");
    check_scalar(view_count, "view_count", {at::kLong}, x.device());
    check_scalar(cur_iter, "cur_iter_state", {at::kLong}, x.device());
    check_scalar(momentum, "momentum_state", {at::kDouble, at::kFloat}, x.device());
  }
}

bool check_forward_train(const TrainInputs& inputs, const State& state, bool has_others) {
  const at::Tensor& x = inputs.x;
  check_input(x, inputs.residual);
  state.check(x);
  check_affine(x, inputs.weight, inputs.bias);
  if (!has_others) {
    if (x.sym_numel() == 0) {
      return false;
    }
    check_batch_statistics(x);
  }
  // A collective in a backward pass, even without a state, could meet another one on another rank.
  if (state.tracks() || has_others) {
    check_not_recomputing();
  }
  return true;
}

void check_parameters(const at::Tensor& x, const ops::MaybeTensor& weight, const ops::MaybeTensor& bias,
                      const ops::MaybeTensor& running_mean, const ops::MaybeTensor& running_var) {
  check_input(x, std::nullopt);
  TORCH_CHECK_VALUE(given(running_mean) == given(running_var),
                    "running_mean and running_var must be given both or neither (got only ",
                    given(running_mean) ? "running_mean" : "running_var", ")");
  if (given(running_mean)) {
    check_parameter(x, *running_mean, "running_mean");
    check_parameter(x, *running_var, "running_var");
  }
  check_affine(x, weight, bias);
}

bool check_forward_functional(const ops::ForwardFunctional& call) {
  check_eps(call.eps);
  check_momentum(call.momentum);
  check_parameters(call.x, call.weight, call.bias, call.running_mean, call.running_var);
  if (call.x.sym_numel() == 0) {
    return false;
  }
  check_batch_statistics(call.x);
  return true;
}

void check_forward_eval(const ops::ForwardEvalInplace& call) {
  check_eps(call.eps);
  check_input(call.x, call.residual);
  check_channels(call.x, call.running_mean.sym_size(0));
  check_parameters(call.x, call.weight, call.bias, call.running_mean, call.running_var);
}

void check_backward(const at::Tensor& dy, const ops::MaybeTensor& x, const ops::MaybeTensor& y,
                    const ops::MaybeTensor& weight, const ops::MaybeTensor& bias, const at::Tensor& saved, bool relu,
                    const ops::OutputMask& output_mask, bool through_statistics) {
  check_input(dy, std::nullopt);
  TORCH_CHECK_VALUE(
      given(x) || !(output_mask[1] || (output_mask[0] && through_statistics) || (relu && !given(y))),
      "x must be given where the weight's gradient is asked for, where the statistics take gradients, and "
      "where the activation's mask is not taken from y (got None)");
  TORCH_CHECK_VALUE(given(weight) || !output_mask[1],
                    "weight must be given where its gradient is asked for (got None)");
  if (given(x)) {
    check_same(*x, "x", dy, "dy");
  }
  if (given(y)) {
    check_same(*y, "y", dy, "dy");
  }
  check_affine(dy, weight, bias);
  const auto dtype = accumulate_type(dy.scalar_type());
  const int64_t rows = through_statistics ? 6 : 3;
  TORCH_CHECK_VALUE(saved.dim() == 2 && saved.sym_size(0) == rows && saved.sym_size(1) == dy.sym_size(1),
                    "saved must have 3 or 6 rows of ", dy.sym_size(1), " channels (got shape ", saved.sym_sizes(), ")");
  TORCH_CHECK_TYPE(saved.scalar_type() == dtype, "saved must be ", dtype, " (got ", saved.scalar_type(), ")");
  TORCH_CHECK_VALUE(saved.device() == dy.device() && saved.layout() == at::kStrided,
                    "saved must be a dense tensor on dy's device ", dy.device(), " (got ", saved.layout(), " on ",
                    saved.device(), ")");
}

void check_gradient_sums(const ops::GradientSums& call, bool relu) {
  check_backward(call.dy, call.x, call.y, call.weight, call.bias, call.saved, relu,
                 {true, call.output_mask[1], call.output_mask[2], call.output_mask[3]}, /*through_statistics=*/true);
}

void check_gradient_of_input(const ops::GradientOfInput& call, bool relu) {
  check_backward(call.dy, call.x, call.y, call.weight, call.bias, call.saved, relu, {true, false, false, false},
                 /*through_statistics=*/true);
  const auto dtype = blend_type(call.dy);
  TORCH_CHECK_VALUE(call.sums.dim() == 2 && call.sums.sym_size(0) == 2 && call.sums.sym_size(1) == call.dy.sym_size(1),
                    "sums must have shape [2, ", call.dy.sym_size(1), "] (got ", call.sums.sym_sizes(), ")");
  TORCH_CHECK_TYPE(call.sums.scalar_type() == dtype, "sums must be ", dtype, " (got ", call.sums.scalar_type(), ")");
  TORCH_CHECK_VALUE(call.sums.device() == call.dy.device() && call.sums.layout() == at::kStrided,
                    "sums must be a dense tensor on dy's device ", call.dy.device(), " (got ", call.sums.layout(),
                    " on ", call.sums.device(), ")");
}

void check_advance_schedule(const ops::AdvanceSchedule& call) {
  check_scalar(call.cur_iter, "cur_iter", {at::kLong}, call.cur_iter.device());
  check_scalar(call.momentum, "momentum", {at::kDouble, at::kFloat}, call.cur_iter.device());
  check_total_iters(call.total_iters);
  schedule_of(call.schedule);
}

void check_writable(const at::Tensor& tensor, const char* name) {
  // torch's words, as far as they go.
  TORCH_CHECK(!may_overlap_itself(tensor), "unsupported operation: ", name,
              ": more than one element of the written-to tensor refers to a single memory location (got shape ",
              tensor.sym_sizes(), ", strides ", tensor.sym_strides(),
              "). Please clone() the tensor before performing the operation.");
}

}  // namespace momentum_bn
