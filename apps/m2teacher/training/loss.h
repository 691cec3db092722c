#pragma once

#include <ATen/core/Tensor.h>

namespace m2teacher {

/// 2 - 2 cos(prediction, target), mean over the batch: 0 where they point the same way, 4 where they are opposite.
/// @param prediction  (N, D)
/// @param target      (N, D); takes no gradient
/// @return ()
at::Tensor cosine_loss(const at::Tensor& prediction, const at::Tensor& target);

}  // namespace m2teacher
