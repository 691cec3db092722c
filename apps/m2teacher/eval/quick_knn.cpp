#include "eval/quick_knn.h"

#include "eval/draw_images.h"
#include "eval/features.h"
#include "eval/knn.h"

#include <algorithm>
#include <memory>

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
  const auto part = [&](const std::shared_ptr<const ImageSource>& images, int64_t count) {
    const at::Tensor drawn =
        draw_images(*images, labelled_images(*images), count, Spread::Proportional, pretrainer.options().seed);
    return encode(teacher->encoder(), images, drawn, dataset.pixels, loader);
  };
  const LabelledFeatures bank = part(dataset.train, kBank);
  KnnOptions options;
  options.neighbours = std::min(options.neighbours, bank.features.size(0));
  const double accuracy = knn_accuracy(part(dataset.test, kQueries), bank, dataset.classes(), options);
  teacher->train();
  return accuracy;
}

}  // namespace m2teacher
