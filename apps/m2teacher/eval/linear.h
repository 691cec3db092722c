#pragma once

#include "eval/features.h"

#include <string>
#include <vector>

namespace m2teacher {

/// A linear probe: logistic regression on frozen, standardised features.

struct LinearProbeOptions {
  int64_t steps = 600;
  int64_t batch_size = 1024;
  double learning_rate = 0.3;  ///< falls to 0 by a half cosine
  double sgd_momentum = 0.9;
  uint64_t seed = 0;
};

/// Accuracy in percent on `test` of a probe trained by SGD on all of `train`.
double linear_accuracy(const LabelledFeatures& train, const LabelledFeatures& test, int64_t classes,
                       const LinearProbeOptions& options = {});

struct FewLabelsOptions {
  int64_t labels_per_class = 10;
  int64_t draws = 5;             ///< different choices of labels, whose accuracies are averaged
  double weight_penalty = 1e-2;  ///< times half the squared norm of the weights, added to the mean cross entropy
  int64_t max_iterations = 100;
  uint64_t seed = 0;
};

/// Mean accuracy in percent on `test` of probes trained by L-BFGS on a few labels of `train`.
/// @throws UserError  a class has fewer labels than asked for
double few_labels_accuracy(const LabelledFeatures& train, const LabelledFeatures& test, int64_t classes,
                           const FewLabelsOptions& options = {});

/// One or the other, with the defaults.
/// @param labels_per_class  0: all
double probe_accuracy(const LabelledFeatures& train, const LabelledFeatures& test, int64_t classes,
                      int64_t labels_per_class, uint64_t seed);

/// Why so many labels per class cannot be had of the images: the first class that has some training images, but too
/// few. Empty where they can be had.
/// @param labels  (N), int64, of the training images
std::string too_few_labels(const at::Tensor& labels, const std::vector<std::string>& class_names,
                           int64_t labels_per_class);

/// `count` indices per class that has any, drawn without replacement: (classes * count), int64.
at::Tensor draw_per_class(const at::Tensor& labels, int64_t classes, int64_t count, uint64_t seed);

}  // namespace m2teacher
