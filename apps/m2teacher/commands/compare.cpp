#include "commands/compare.h"

#include "error.h"
#include "eval/knn.h"
#include "eval/linear.h"
#include "eval/shifted.h"
#include "output/table.h"

#include <iostream>

namespace m2teacher {
namespace {

constexpr double kDemoShift = 0.3;
constexpr int64_t kFewLabels = 10;
constexpr int64_t kMoreLabels = 100;

using Featuriser = std::function<LabelledFeatures(const std::shared_ptr<const ImageSource>& images)>;

/// The figures of one row of the table.
std::vector<std::string> compare_row(const std::string& name, const Featuriser& features, const Dataset& dataset,
                                     const Dataset& moved, uint64_t seed) {
  std::cerr << "evaluating: " << name << '\n';
  const int64_t classes = dataset.classes();
  const LabelledFeatures train = features(dataset.train);
  const LabelledFeatures test = features(dataset.test);
  std::vector<std::string> row = {name};
  row.push_back(format_number(knn_accuracy(test, train, classes), 1));
  row.push_back(format_number(knn_accuracy(features(moved.test), features(moved.train), classes), 1));
  for (const int64_t labels : {int64_t{0}, kFewLabels, kMoreLabels}) {
    const bool possible = too_few_labels(train.labels, dataset.class_names, labels).empty();
    row.push_back(possible ? format_number(probe_accuracy(train, test, classes, labels, seed), 1) : "-");
  }
  return row;
}

}  // namespace

void run_compare(const CompareCommand& command) {
  const Evaluation evaluation = open_labelled_evaluation(command.source, "compare");
  const Checkpoint& checkpoint = evaluation.checkpoint;
  const Dataset& dataset = evaluation.dataset;
  if (KnnOptions().neighbours > dataset.train->size()) {
    throw UserError("--data: has " + std::to_string(dataset.train->size()) + " training images, compare needs " +
                    std::to_string(KnnOptions().neighbours));
  }
  const Dataset moved = shifted(dataset, kDemoShift, command.seed);
  const auto by = [&](const Encoder& encoder) -> Featuriser {
    return [&evaluation, encoder](const std::shared_ptr<const ImageSource>& images) {
      return evaluation.features(encoder, images);
    };
  };
  const auto pixels = [device = evaluation.device](const std::shared_ptr<const ImageSource>& images) {
    return LabelledFeatures{
        .features = raw_pixels(images_in_memory(*images)).to(device), .labels = images->labels(), .index = {}};
  };
  Encoder untrained = untrained_encoder(checkpoint.settings.recipe.model.encoder, images_in_memory(*dataset.train),
                                        checkpoint.trained_on.pixels, command.seed);
  untrained->to(evaluation.device);

  std::vector<std::vector<std::string>> rows = {
      {"accuracy on test images, %", "kNN", "kNN shifted", "linear", "10 labels", "100 labels"}};
  const auto add = [&](const std::string& name, const Featuriser& features) {
    rows.push_back(compare_row(name, features, dataset, moved, command.seed));
  };
  add("raw pixels", pixels);
  add("untrained encoder", by(untrained));
  add("trained student", by(evaluation.encoder(BranchImpl::Side::Student)));
  add("trained teacher", by(evaluation.encoder(BranchImpl::Side::Teacher)));
  std::cout << format_table(rows) << std::flush;
}

}  // namespace m2teacher
