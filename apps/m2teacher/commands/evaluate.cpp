#include "commands/evaluate.h"

#include "error.h"
#include "eval/linear.h"
#include "eval/shifted.h"
#include "output/table.h"

#include <iostream>
#include <sstream>

namespace m2teacher {

void run_knn(const KnnCommand& command) {
  Evaluation evaluation = open_labelled_evaluation(command.source, "knn");
  Dataset& dataset = evaluation.dataset;
  if (command.options.neighbours > dataset.train->size()) {
    throw UserError("--neighbours: " + std::to_string(command.options.neighbours) + " is more than the " +
                    std::to_string(dataset.train->size()) + " training images");
  }
  if (command.shift > 0) {
    dataset = shifted(dataset, command.shift, command.seed);
  }
  const Encoder encoder = build_encoder(evaluation.checkpoint, command.side);
  const LabelledFeatures train = evaluation.features(encoder, dataset.train);
  const LabelledFeatures test = evaluation.features(encoder, dataset.test);
  const double accuracy = knn_accuracy(test, train, dataset.classes(), command.options);
  std::cout << "kNN (k=" << command.options.neighbours << "): " << format_number(accuracy, 2) << " %\n";
}

void run_linear(const LinearCommand& command) {
  const Evaluation evaluation = open_labelled_evaluation(command.source, "linear");
  const Dataset& dataset = evaluation.dataset;
  const Encoder encoder = build_encoder(evaluation.checkpoint, command.side);
  const LabelledFeatures train = evaluation.features(encoder, dataset.train);
  const LabelledFeatures test = evaluation.features(encoder, dataset.test);
  std::ostringstream lines;
  for (const int64_t labels : command.labels_per_class) {
    const double accuracy = probe_accuracy(train, test, dataset.classes(), labels, command.seed);
    lines << "linear (" << (labels == 0 ? "all labels" : std::to_string(labels) + " labels per class")
          << "): " << format_number(accuracy, 2) << " %\n";
  }
  std::cout << lines.str() << std::flush;
}

}  // namespace m2teacher
