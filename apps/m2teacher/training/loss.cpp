#include "training/loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cosine_similarity.h>

namespace m2teacher {

at::Tensor cosine_loss(const at::Tensor& prediction, const at::Tensor& target) {
  return 2 - 2 * at::cosine_similarity(prediction.to(at::kFloat), target.detach().to(at::kFloat), /*dim=*/1).mean();
}

}  // namespace m2teacher
