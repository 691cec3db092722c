#include "ops/shared/outputs.h"

#include "ops/shared/dtypes.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

namespace momentum_bn {

at::Tensor empty_output(const at::Tensor& x) { return at::empty_like(x, x.options(), x.suggest_memory_format()); }

at::Tensor empty_saved(const at::Tensor& x, bool detach_statistics) {
  const int64_t rows = detach_statistics ? kSavedRows : kSavedRowsThroughStatistics;
  return at::empty_symint({rows, x.sym_size(1)}, x.options().dtype(accumulate_type(x.scalar_type())));
}

at::Tensor zero_saved(const at::Tensor& x, bool detach_statistics) { return empty_saved(x, detach_statistics).zero_(); }

at::Tensor empty_per_channel(const at::Tensor& x, at::ScalarType dtype) {
  return at::empty_symint({x.sym_size(1)}, x.options().dtype(dtype));
}

void zero_where_defined(std::initializer_list<at::Tensor> sums) {
  for (const auto& sum : sums) {
    if (sum.defined()) {
      sum.zero_();
    }
  }
}

}  // namespace momentum_bn
