#include "ops/inputs.h"

#include "ops/checks.h"
#include "ops/composite/formulas.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

namespace momentum_bn {
namespace {

void check_affine(const at::Tensor& x, const ops::MaybeTensor& weight, const ops::MaybeTensor& bias) {
  if (weight) check_parameter(x, *weight, "weight");
  if (bias) check_parameter(x, *bias, "bias");
}

}  // namespace

bool check_forward_train(const at::Tensor& x, const ops::MaybeTensor& residual, const ops::MaybeTensor& weight,
                         const ops::MaybeTensor& bias, const State& state, bool has_others) {
  check_input(x, residual);
  state.check(x);
  check_affine(x, weight, bias);
  if (!has_others) {
    if (x.sym_numel() == 0) return false;
    check_batch_statistics(x);
  }
  // A collective in a backward pass, even without a state, could meet another one on another rank.
  if (state.tracks() || has_others) check_not_recomputing();
  return true;
}

void check_parameters(const at::Tensor& x, const ops::MaybeTensor& weight, const ops::MaybeTensor& bias,
                      const ops::MaybeTensor& running_mean, const ops::MaybeTensor& running_var) {
  check_input(x, std::nullopt);
  const bool has_mean = running_mean && running_mean->defined();
  const bool has_var = running_var && running_var->defined();
  TORCH_CHECK_VALUE(has_mean == has_var, "running_mean and running_var must be given both or neither (got only ",
                    has_mean ? "running_mean" : "running_var", ")");
  if (has_mean) {
    check_parameter(x, *running_mean, "running_mean");
    check_parameter(x, *running_var, "running_var");
  }
  check_affine(x, weight, bias);
}

bool check_forward_functional(const at::Tensor& x, const ops::MaybeTensor& weight, const ops::MaybeTensor& bias,
                              const ops::MaybeTensor& running_mean, const ops::MaybeTensor& running_var,
                              double momentum, double eps) {
  check_eps(eps);
  check_momentum(momentum);
  check_parameters(x, weight, bias, running_mean, running_var);
  if (x.sym_numel() == 0) return false;
  check_batch_statistics(x);
  return true;
}

void check_forward_eval(const at::Tensor& x, const ops::MaybeTensor& residual, const ops::MaybeTensor& weight,
                        const ops::MaybeTensor& bias, const at::Tensor& running_mean, const at::Tensor& running_var) {
  check_input(x, residual);
  check_channels(x, running_mean.size(0));
  check_parameters(x, weight, bias, running_mean, running_var);
}

void check_backward(const at::Tensor& dy, const ops::MaybeTensor& x, const ops::MaybeTensor& y,
                    const ops::MaybeTensor& weight, const at::Tensor& saved, bool relu,
                    const std::array<bool, 4>& output_mask) {
  check_input(dy, std::nullopt);
  const auto given = [](const ops::MaybeTensor& tensor) { return tensor && tensor->defined(); };
  TORCH_CHECK_VALUE(!output_mask[1] || (given(x) && given(weight)),
                    "x and weight must be given where the weight's gradient is asked for (got None)");
  TORCH_CHECK_VALUE(!relu || given(y), "y must be given with activation 'relu' (got None)");
  if (given(x)) {
    check_same(*x, "x", dy, "dy");
  }
  if (given(y)) {
    check_same(*y, "y", dy, "dy");
  }
  if (given(weight)) {
    check_parameter(dy, *weight, "weight");
  }
  const auto dtype = composite::accumulate_type(dy.scalar_type());
  TORCH_CHECK_VALUE(saved.dim() == 2 && saved.sym_size(0) == 3 && saved.sym_size(1) == dy.sym_size(1),
                    "saved must have shape [3, ", dy.sym_size(1), "] (got ", saved.sym_sizes(), ")");
  TORCH_CHECK_TYPE(saved.scalar_type() == dtype, "saved must be ", dtype, " (got ", saved.scalar_type(), ")");
  TORCH_CHECK_VALUE(saved.device() == dy.device(), "saved must be on dy's device ", dy.device(), " (got ",
                    saved.device(), ")");
}

void check_writable(const at::Tensor& x) { at::assert_no_internal_overlap(x); }

at::Tensor empty_output(const at::Tensor& x) { return at::empty_like(x, x.options(), x.suggest_memory_format()); }

at::Tensor zero_saved(const at::Tensor& x) {
  return at::zeros_symint({3, x.sym_size(1)}, x.options().dtype(composite::accumulate_type(x.scalar_type())));
}

}  // namespace momentum_bn
