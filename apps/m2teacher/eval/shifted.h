#pragma once

#include "data/image_source.h"

#include <cstdint>

namespace m2teacher {

/// A data set in memory, its images shifted and flipped as `shift_and_flip` does, the test images by other random
/// numbers than the training images.
/// @throws UserError  the images are not in memory
Dataset shifted(const Dataset& dataset, double shift, uint64_t seed);

}  // namespace m2teacher
