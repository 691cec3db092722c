#include <momentum_bn/functional.h>

#include "ops/normalise/calls.h"
#include "ops/normalise/composite.h"
#include "ops/normalise/inputs.h"
#include "ops/normalise/options.h"
#include "ops/shared/kernel_tensors.h"

#include <ATen/ops/empty.h>

namespace momentum_bn::functional {

std::tuple<at::Tensor, at::Tensor, at::Tensor> momentum_batch_norm(const at::Tensor& x, const at::Tensor& running_mean,
                                                                   const at::Tensor& running_var,
                                                                   const at::Tensor& weight, const at::Tensor& bias,
                                                                   bool training, double momentum, double eps,
                                                                   Variance variance) {
  if (training) {
    auto [y, b_mean, b_var, saved] =
        ops::call(ops::ForwardFunctional{x, weight, bias, running_mean, running_var, momentum, eps, to_word(variance)});
    return {y, b_mean, b_var};
  }
  const auto nothing = at::empty({0}, x.options().dtype(accumulate_type(x.scalar_type())));
  if (!running_mean.defined() && !running_var.defined()) {  // nothing but the batch to normalise with
    auto y = std::get<0>(momentum_batch_norm(x, {}, {}, weight, bias, /*training=*/true, momentum, eps, variance));
    return {y, nothing, nothing.clone()};
  }
  check_momentum(momentum);
  check_eps(eps);
  check_parameters(x, weight, bias, running_mean, running_var);
  auto y = composite::evaluate(x, std::nullopt, weight, bias, running_mean, running_var, eps, /*relu=*/false);
  return {y, nothing, nothing.clone()};
}

}  // namespace momentum_bn::functional
