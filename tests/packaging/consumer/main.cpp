// Calls the library once, checks one number of what comes back and prints the library's configuration.

#include <momentum_bn/functional.h>
#include <momentum_bn/show_config.h>

#include <ATen/ops/arange.h>

#include <cmath>
#include <iostream>

int main() {
  const at::Tensor x = at::arange(12, at::kDouble).view({4, 3});
  const at::Tensor b_var =
      std::get<2>(momentum_bn::functional::momentum_batch_norm(x, {}, {}, {}, {}, /*training=*/true));
  std::cout << momentum_bn::show_config();
  // Every column is 0, 3, 6, 9 plus a constant: unbiased variance 15.
  return b_var.numel() == 3 && std::abs(b_var[0].item<double>() - 15.0) < 1e-12 ? 0 : 1;
}
