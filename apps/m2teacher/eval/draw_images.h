#pragma once

#include "data/image_source.h"

namespace m2teacher {

/// How drawn images are divided among the classes.
enum class Spread {
  Proportional,  ///< as all images are, so that a figure of the drawn ones is an estimate of that of all
  Balanced,  ///< as many of each class as of any other, as far as it has them; the first classes where few are drawn
};

/// All images of a source: (size()), int64.
at::Tensor all_images(const ImageSource& source);

/// Those that have a label, in order: (N), int64. All where none has one.
at::Tensor labelled_images(const ImageSource& source);

/// Draws some of the given images by the seed, spread over the classes. Images without labels are one class.
/// @param among  (N), int64
/// @param count  how many; all where there are fewer
/// @return (min(N, count)), int64: Proportional in the order of the images, Balanced a class after the other in turn
at::Tensor draw_images(const ImageSource& source, const at::Tensor& among, int64_t count, Spread spread, uint64_t seed);

}  // namespace m2teacher
