#include "eval/shifted.h"

#include "data/augment.h"

#include <memory>

namespace m2teacher {

Dataset shifted(const Dataset& dataset, double shift, uint64_t seed) {
  const auto moved = [shift](const ImageSource& set, uint64_t draw) {
    return std::make_shared<TensorSource>(shift_and_flip(images_in_memory(set), shift, draw), set.labels());
  };
  Dataset out = dataset;
  out.train = moved(*dataset.train, 2 * seed);
  out.test = moved(*dataset.test, 2 * seed + 1);
  return out;
}

}  // namespace m2teacher
