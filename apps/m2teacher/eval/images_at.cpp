#include "eval/images_at.h"

#include "data/image_folder.h"

#include <ATen/ops/zeros.h>

namespace m2teacher {

at::Tensor images_at(const ImageSource& source, const at::Tensor& index) {
  const auto* folder = dynamic_cast<const FolderSource*>(&source);
  if (folder == nullptr) {
    return images_in_memory(source).index_select(0, index);
  }
  const ImageShape shape = source.shape();
  const at::Tensor images = at::zeros({index.size(0), shape.height, shape.width, shape.channels}, at::kByte);
  for (int64_t i = 0; i < index.size(0); ++i) {
    folder->read_centre(index[i].item<int64_t>(), images[i].mutable_data_ptr<uint8_t>());
  }
  return images.permute({0, 3, 1, 2}).contiguous();
}

}  // namespace m2teacher
