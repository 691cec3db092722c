#include "data/crop.h"

#include <algorithm>
#include <cmath>

namespace m2teacher {
namespace {

constexpr int kTries = 10;

}  // namespace

CropBox random_crop(const AugmentOptions& options, int64_t height, int64_t width, Random random) {
  const double shape = static_cast<double>(width) / static_cast<double>(height);
  const double reach = std::log(options.max_aspect);
  for (int attempt = 0; attempt < kTries; ++attempt) {
    const double area = random.uniform(options.min_area, options.max_area);
    const double aspect = std::exp(random.uniform(-reach, reach));
    CropBox box;
    box.width = std::sqrt(area * aspect / shape);
    box.height = std::sqrt(area / aspect * shape);
    if (box.width <= 1 && box.height <= 1) {
      box.left = random.uniform() * (1 - box.width);
      box.top = random.uniform() * (1 - box.height);
      return box;
    }
  }
  CropBox box;
  box.width = std::min(1.0, options.max_aspect / shape);
  box.height = std::min(1.0, options.max_aspect * shape);
  box.left = (1 - box.width) / 2;
  box.top = (1 - box.height) / 2;
  return box;
}

}  // namespace m2teacher
