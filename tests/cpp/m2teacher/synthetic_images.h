#pragma once

#include <ATen/ATen.h>

namespace m2teacher {

/// Images with something to learn: a bright bar somewhere on a noisy ground. (count, 1, 28, 28), uint8.
inline at::Tensor bar_images(int64_t count) {
  at::manual_seed(0);
  at::Tensor images = at::randint(0, 60, {count, 1, 28, 28}).to(at::kByte);
  for (int64_t i = 0; i < count; ++i) {
    images[i][0].narrow(static_cast<int64_t>(i % 2), 3 + i % 20, 4).fill_(220);
  }
  return images;
}

}  // namespace m2teacher
