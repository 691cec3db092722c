#include "ops/normalise/checks.h"

#include "ops/shared/checks.h"
#include "ops/shared/dtypes.h"

#include <ATen/MemoryOverlap.h>

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

}  // namespace

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

void check_writable(const at::Tensor& x) { at::assert_no_internal_overlap(x); }

}  // namespace momentum_bn
