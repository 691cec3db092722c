#include "ops/shared/dtypes.h"

#include <c10/util/Exception.h>

namespace momentum_bn {

bool has_kernels(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
}

kernels::Type kernel_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return kernels::Type::kFloat;
    case at::kDouble:
      return kernels::Type::kDouble;
    case at::kBFloat16:
      return kernels::Type::kBFloat16;
    case at::kHalf:
      return kernels::Type::kHalf;
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernels for ", dtype);
  }
}

at::ScalarType accumulate_type(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

at::ScalarType blend_type(const at::Tensor& x) { return x.device().is_mps() ? at::kFloat : at::kDouble; }

}  // namespace momentum_bn
