#include "eval/images_at.h"

#include <ATen/ops/zeros.h>

namespace m2teacher {

at::Tensor images_at(const ImageSource& source, const at::Tensor& index) {
  const ImageShape shape = source.shape();
  const at::Tensor images = at::zeros({index.size(0), shape.height, shape.width, shape.channels}, at::kByte);
  for (int64_t i = 0; i < index.size(0); ++i) {
    source.read_centre(index[i].item<int64_t>(), images[i].mutable_data_ptr<uint8_t>());
  }
  return images.permute({0, 3, 1, 2}).contiguous();
}

}  // namespace m2teacher
