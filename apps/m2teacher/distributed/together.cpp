#include "distributed/together.h"

#include <ATen/ops/scalar_tensor.h>

namespace m2teacher {

void together(const Ranks& ranks, const std::function<void()>& work) {
  if (ranks.alone()) {
    work();
    return;
  }
  std::exception_ptr error;
  try {
    work();
  } catch (...) {
    error = std::current_exception();
  }
  const std::vector<at::Tensor> failed = ranks.gather(at::scalar_tensor(error != nullptr, at::kByte));
  for (int64_t rank = 0; rank < ranks.count(); ++rank) {
    if (failed[static_cast<size_t>(rank)].item<uint8_t>() == 0) {
      continue;
    }
    if (rank == ranks.rank()) {
      std::rethrow_exception(error);
    }
    throw ToldElsewhere(error);
  }
}

}  // namespace m2teacher
