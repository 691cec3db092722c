#include <momentum_bn/functional.h>

#include "ops/checks.h"
#include "ops/composite/formulas.h"
#include "ops/ops.h"

#include <ATen/ops/batch_norm.h>
#include <ATen/ops/empty.h>

namespace momentum_bn::functional {

std::tuple<at::Tensor, at::Tensor, at::Tensor> momentum_batch_norm(
    const at::Tensor& x, const at::Tensor& running_mean, const at::Tensor& running_var, const at::Tensor& weight,
    const at::Tensor& bias, bool training, double momentum, double eps, Variance variance) {
  if (training) {
    auto [y, b_mean, b_var, saved] =
        ops::forward_functional(x, weight, bias, running_mean, running_var, momentum, eps, to_word(variance));
    return {y, b_mean, b_var};
  }
  check_eps(eps);
  check_momentum(momentum);
  check_input(x, std::nullopt);
  TORCH_CHECK_VALUE(running_mean.defined() && running_var.defined(),
                    "running_mean and running_var must be given where training is false");
  for (const auto& [name, parameter] : {std::pair<const char*, const at::Tensor&>{"running_mean", running_mean},
                                        {"running_var", running_var},
                                        {"weight", weight},
                                        {"bias", bias}}) {
    check_parameter(x, parameter, name);
  }
  const auto nothing = at::empty({0}, x.options().dtype(composite::accumulate_type(x.scalar_type())));
  return {at::batch_norm(x, weight, bias, running_mean, running_var, /*training=*/false, /*momentum=*/0, eps,
                         /*cudnn_enabled=*/true),
          nothing, nothing.clone()};
}

}  // namespace momentum_bn::functional
