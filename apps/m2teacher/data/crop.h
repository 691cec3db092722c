#pragma once

#include "data/augment_options.h"
#include "data/random.h"

#include <ATen/core/Tensor.h>

namespace m2teacher {

/// Part of an image, in shares of the image's sides: each within [0, 1], and the whole inside.
struct CropBox {
  double left = 0;
  double top = 0;
  double width = 1;
  double height = 1;
};

/// A random part of an image of this size, of an area and a shape as the options say. A part that sticks out is drawn
/// again; after ten, it is the largest part in the middle whose shape is allowed (as torchvision's RandomResizedCrop).
CropBox random_crop(const AugmentOptions& options, int64_t height, int64_t width, Random random);

/// Writes a part of an image, scaled (bilinear, antialiased): (height, width, C), uint8, one value after the other.
/// @param image  (H, W, C), uint8
void scale_part(const at::Tensor& image, const CropBox& box, int64_t height, int64_t width, uint8_t* into);

}  // namespace m2teacher
