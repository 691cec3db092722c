#pragma once

#include "eval/features.h"

namespace m2teacher {

struct KnnOptions {
  int64_t neighbours = 20;
  double temperature = 0.07;
};

/// The most similar rows of a bank, by cosine.
struct Neighbours {
  at::Tensor similarity;  ///< (Q, k), float32, falling
  at::Tensor index;       ///< (Q, k), int64, rows of the bank
};

/// @param queries  (Q, F)
/// @param bank     (B, F); at least `count` rows
Neighbours nearest_neighbours(const at::Tensor& queries, const at::Tensor& bank, int64_t count);

/// Share, in percent, of queries whose label wins the vote of their nearest neighbours in the bank, each weighing
/// exp(cosine / temperature) (arXiv 1805.01978, section 3.4).
double knn_accuracy(const LabelledFeatures& queries, const LabelledFeatures& bank, int64_t classes,
                    const KnnOptions& options = {});

}  // namespace m2teacher
