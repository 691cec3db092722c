#include "commands/evaluate.h"

#include "checkpoint/checkpoint.h"
#include "checkpoint/safetensors.h"
#include "data/augment.h"
#include "data/load_dataset.h"
#include "error.h"
#include "output/table.h"

#include <ATen/ops/cat.h>

#include <functional>
#include <iostream>
#include <sstream>

namespace m2teacher {
namespace {

constexpr double kDemoShift = 0.3;
constexpr int64_t kFewLabels = 10;
constexpr int64_t kMoreLabels = 100;

/// Images (N, C, H, W), uint8, to features (N, F).
using Featuriser = std::function<at::Tensor(const at::Tensor& images)>;

Featuriser featuriser(Encoder encoder, const PixelStatistics& pixels) {
  return [encoder, pixels](const at::Tensor& images) mutable { return encode(encoder, images, pixels); };
}

LabelledFeatures featurise(const ImageSource& set, const Featuriser& features) {
  return {features(images_in_memory(set)), set.labels()};
}

/// Both sets shifted and flipped, the test images by other random numbers than the training images.
Dataset shifted(const Dataset& dataset, double shift, uint64_t seed) {
  Dataset out = dataset;
  const auto moved = [shift](const ImageSource& set, uint64_t draw) {
    return std::make_shared<TensorSource>(shift_and_flip(images_in_memory(set), shift, draw), set.labels());
  };
  out.train = moved(*dataset.train, 2 * seed);
  out.test = moved(*dataset.test, 2 * seed + 1);
  return out;
}

double probe_accuracy(const LabelledFeatures& train, const LabelledFeatures& test, int64_t classes,
                      int64_t labels_per_class, uint64_t seed) {
  if (labels_per_class == 0) {
    return linear_accuracy(train, test, classes, {.seed = seed});
  }
  return few_labels_accuracy(train, test, classes, {.labels_per_class = labels_per_class, .seed = seed});
}

/// The figures of one row of the table.
std::vector<std::string> compare_row(const std::string& name, const Featuriser& features, const Dataset& dataset,
                                     const Dataset& moved, uint64_t seed) {
  std::cerr << "evaluating: " << name << '\n';
  const int64_t classes = dataset.classes();
  const LabelledFeatures train = featurise(*dataset.train, features);
  const LabelledFeatures test = featurise(*dataset.test, features);
  std::vector<std::string> row = {name};
  row.push_back(format_number(knn_accuracy(test, train, classes), 1));
  row.push_back(
      format_number(knn_accuracy(featurise(*moved.test, features), featurise(*moved.train, features), classes), 1));
  for (const int64_t labels : {int64_t{0}, kFewLabels, kMoreLabels}) {
    row.push_back(format_number(probe_accuracy(train, test, classes, labels, seed), 1));
  }
  return row;
}

}  // namespace

void run_knn(const KnnCommand& command) {
  Dataset dataset = load_dataset(command.source.data);
  const Featuriser features = featuriser(load_encoder(command.source.checkpoint, command.source.side), dataset.pixels);
  if (command.options.neighbours > dataset.train->size()) {
    throw UserError("--neighbours: " + std::to_string(command.options.neighbours) + " is more than the " +
                    std::to_string(dataset.train->size()) + " training images");
  }
  if (command.shift > 0) {
    dataset = shifted(dataset, command.shift, command.seed);
  }
  const double accuracy = knn_accuracy(featurise(*dataset.test, features), featurise(*dataset.train, features),
                                       dataset.classes(), command.options);
  std::cout << "kNN (k=" << command.options.neighbours << "): " << format_number(accuracy, 2) << " %\n";
}

void run_linear(const LinearCommand& command) {
  const Dataset dataset = load_dataset(command.source.data);
  const Featuriser features = featuriser(load_encoder(command.source.checkpoint, command.source.side), dataset.pixels);
  const LabelledFeatures train = featurise(*dataset.train, features);
  const LabelledFeatures test = featurise(*dataset.test, features);
  std::ostringstream lines;
  for (const int64_t labels : command.labels_per_class) {
    const double accuracy = probe_accuracy(train, test, dataset.classes(), labels, command.seed);
    lines << "linear (" << (labels == 0 ? "all labels" : std::to_string(labels) + " labels per class")
          << "): " << format_number(accuracy, 2) << " %\n";
  }
  std::cout << lines.str() << std::flush;
}

void run_compare(const CompareCommand& command) {
  const Dataset dataset = load_dataset(command.data);
  const CheckpointInfo info = read_checkpoint_info(command.checkpoint);
  const Encoder student = load_encoder(command.checkpoint, BranchImpl::Side::Student);
  const Encoder teacher = load_encoder(command.checkpoint, BranchImpl::Side::Teacher);
  const Encoder untrained = untrained_encoder(info.encoder, images_in_memory(*dataset.train), dataset.pixels, command.seed);
  const Dataset moved = shifted(dataset, kDemoShift, command.seed);

  std::vector<std::vector<std::string>> rows = {
      {"accuracy on test images, %", "kNN", "kNN shifted", "linear", "10 labels", "100 labels"}};
  rows.push_back(compare_row("raw pixels", raw_pixels, dataset, moved, command.seed));
  rows.push_back(compare_row("untrained encoder", featuriser(untrained, dataset.pixels), dataset, moved, command.seed));
  rows.push_back(compare_row("trained student", featuriser(student, dataset.pixels), dataset, moved, command.seed));
  rows.push_back(compare_row("trained teacher", featuriser(teacher, dataset.pixels), dataset, moved, command.seed));
  std::cout << format_table(rows) << std::flush;
}

void run_neighbours(const NeighboursCommand& command) {
  const Dataset dataset = load_dataset(command.source.data);
  const Featuriser features = featuriser(load_encoder(command.source.checkpoint, command.source.side), dataset.pixels);
  if (command.queries > dataset.test->size()) {
    throw UserError("--queries: " + std::to_string(command.queries) + " is more than the " +
                    std::to_string(dataset.test->size()) + " test images");
  }
  const at::Tensor queries = images_in_memory(*dataset.test).narrow(0, 0, command.queries);
  const at::Tensor query_labels = dataset.test->labels().narrow(0, 0, command.queries);
  const Neighbours nearest = nearest_neighbours(features(queries), features(images_in_memory(*dataset.train)), command.neighbours);
  const auto beside = [&](const at::Tensor& query, const at::Tensor& train) {
    const at::Tensor found = train.index_select(0, nearest.index.flatten());
    std::vector<int64_t> shape = {command.queries, command.neighbours};
    const auto rest = train.sizes().slice(1);
    shape.insert(shape.end(), rest.begin(), rest.end());
    return at::cat({query.unsqueeze(1), found.view(shape)}, 1);
  };
  write_safetensors(command.out, {.metadata = {},
                                  .tensors = {{"images", beside(queries, images_in_memory(*dataset.train)).squeeze(2)},
                                              {"labels", beside(query_labels, dataset.train->labels())}}});
}

}  // namespace m2teacher
