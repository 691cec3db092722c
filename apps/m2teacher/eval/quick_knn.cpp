#include "eval/quick_knn.h"

#include "eval/features.h"
#include "eval/knn.h"

#include <algorithm>

namespace m2teacher {
namespace {

constexpr int64_t kBank = 2000;
constexpr int64_t kQueries = 500;

}  // namespace

std::optional<double> quick_knn(const Pretrainer& pretrainer, const Dataset& dataset, const LoaderOptions& loader) {
  if (!dataset.test || !dataset.train->labels().defined() || !dataset.test->labels().defined()) {
    return std::nullopt;
  }
  Branch teacher = pretrainer.teacher().model();
  const auto part = [&](const ImageSource& images, int64_t count) -> LabelledFeatures {
    count = std::min(count, images.size());
    return {encode(teacher->encoder(), images, count, dataset.pixels, loader), images.labels().narrow(0, 0, count)};
  };
  const LabelledFeatures bank = part(*dataset.train, kBank);
  KnnOptions options;
  options.neighbours = std::min(options.neighbours, bank.features.size(0));
  const double accuracy = knn_accuracy(part(*dataset.test, kQueries), bank, dataset.classes(), options);
  teacher->train();
  return accuracy;
}

}  // namespace m2teacher
