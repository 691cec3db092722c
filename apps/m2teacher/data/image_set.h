#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

namespace m2teacher {

/// Images with their labels.
struct ImageSet {
  at::Tensor images;  ///< (N, C, H, W), uint8
  at::Tensor labels;  ///< (N), int64, in [0, classes)

  int64_t size() const { return images.size(0); }
};

/// A training set and a test set of images of one size.
struct Dataset {
  ImageSet train;
  ImageSet test;
  std::vector<std::string> class_names;

  int64_t classes() const { return static_cast<int64_t>(class_names.size()); }
};

}  // namespace m2teacher
