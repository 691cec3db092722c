#pragma once

#include "data/image_source.h"

namespace m2teacher {

/// A few images of a source, as evaluation sees them.
/// @param index  (N), int64; of images that can be read
/// @return (N, C, H, W), uint8
at::Tensor images_at(const ImageSource& source, const at::Tensor& index);

}  // namespace m2teacher
