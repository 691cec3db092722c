#include "commands/evaluate.h"

#include "error.h"
#include "eval/draw_images.h"
#include "eval/linear.h"
#include "eval/shifted.h"
#include "output/table.h"
#include "text/printable.h"

#include <iostream>
#include <string>
#include <utility>
#include <vector>

namespace m2teacher {

namespace {

/// Divides how many labels per class were chosen by whether the images have them.
struct Choice {
  std::vector<int64_t> possible;
  std::vector<std::pair<int64_t, std::string>> impossible;  ///< and why

  Choice(const std::vector<int64_t>& chosen, const at::Tensor& labels, const std::vector<std::string>& class_names) {
    for (const int64_t count : chosen) {
      std::string why_not = too_few_labels(labels, class_names, count);
      if (why_not.empty()) {
        possible.push_back(count);
      } else {
        impossible.emplace_back(count, std::move(why_not));
      }
    }
  }

  /// Says what cannot be had. @throws UserError  it was asked for
  void leave_out(bool asked_for) const {
    for (const auto& [count, why] : impossible) {
      if (asked_for) {
        throw UserError("--labels-per-class: " + why);
      }
      std::cerr << "left out: linear (" << count << " labels per class): " << printable(why) << '\n';
    }
  }
};

}  // namespace

void run_knn(const KnnCommand& command) {
  Evaluation evaluation = open_labelled_evaluation(command.source, "knn");
  Dataset& dataset = evaluation.dataset;
  const int64_t bank = labelled_images(*dataset.train).size(0);
  if (command.options.neighbours > bank) {
    throw UserError("--neighbours: " + std::to_string(command.options.neighbours) + " is more than the " +
                    std::to_string(bank) + " training images");
  }
  if (command.shift > 0) {
    dataset = shifted(dataset, command.shift, command.seed);
  }
  const Encoder encoder = evaluation.encoder(command.side);
  const LabelledFeatures train = evaluation.labelled_features(encoder, dataset.train);
  const LabelledFeatures test = evaluation.labelled_features(encoder, dataset.test);
  const double accuracy = knn_accuracy(test, train, dataset.classes(), command.options);
  std::cout << "kNN (k=" << command.options.neighbours << "): " << format_number(accuracy, 2) << " %\n";
}

void run_linear(const LinearCommand& command) {
  const Evaluation evaluation = open_labelled_evaluation(command.source, "linear");
  const Dataset& dataset = evaluation.dataset;
  const Choice listed(command.labels_per_class, dataset.train->labels(), dataset.class_names);
  listed.leave_out(command.asked_for);
  const Encoder encoder = evaluation.encoder(command.side);
  const LabelledFeatures train = evaluation.labelled_features(encoder, dataset.train);
  const LabelledFeatures test = evaluation.labelled_features(encoder, dataset.test);
  // Images that could not be read may be missing now.
  const Choice read(listed.possible, train.labels, dataset.class_names);
  for (const int64_t labels : read.possible) {
    const double accuracy = probe_accuracy(train, test, dataset.classes(), labels, command.seed);
    std::cout << "linear (" << (labels == 0 ? "all labels" : std::to_string(labels) + " labels per class")
              << "): " << format_number(accuracy, 2) << " %\n"
              << std::flush;
  }
  read.leave_out(command.asked_for);
}

}  // namespace m2teacher
