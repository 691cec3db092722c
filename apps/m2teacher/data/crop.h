#pragma once

#include "data/augment_options.h"
#include "data/random.h"

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

}  // namespace m2teacher
