#include "commands/pretrain.h"

#include "checkpoint/checkpoint.h"
#include "data/load_dataset.h"
#include "error.h"
#include "eval/knn.h"
#include "output/atomic_file.h"
#include "output/metrics.h"
#include "output/progress.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <iostream>

namespace m2teacher {
namespace {

constexpr int64_t kStepsPerRow = 10;
// Enough for a curve, at under a hundredth of the time that the full evaluation takes.
constexpr int64_t kProbeBank = 2000;
constexpr int64_t kProbeQueries = 500;

/// Accuracy of the teacher as it stands, on the first images of either set.
double quick_knn(const Pretrainer& pretrainer, const Dataset& dataset) {
  Branch teacher = pretrainer.teacher().model();
  const auto part = [&](const ImageSource& set, int64_t count) -> LabelledFeatures {
    count = std::min(count, set.size());
    return {encode(teacher->encoder(), images_in_memory(set).narrow(0, 0, count), dataset.pixels),
            set.labels().narrow(0, 0, count)};
  };
  const LabelledFeatures bank = part(*dataset.train, kProbeBank);
  KnnOptions options;
  options.neighbours = std::min(options.neighbours, bank.features.size(0));
  const double accuracy = knn_accuracy(part(*dataset.test, kProbeQueries), bank, dataset.classes(), options);
  teacher->train();
  return accuracy;
}

}  // namespace

void run_pretrain(const PretrainCommand& command) {
  const Dataset dataset = load_dataset(command.data);
  Pretrainer pretrainer(command.recipe,
                        {.source = dataset.train, .pixels = dataset.pixels, .loader = command.data.loader});
  make_writable_folder(command.out);
  MetricsFile metrics(command.out / kMetricsFile);

  const int64_t steps = pretrainer.total_steps();
  Progress progress(std::cerr, isatty(STDERR_FILENO) != 0, steps, command.recipe.batch_size);
  for (int64_t step = 1; step <= steps; ++step) {
    const StepReport report = pretrainer.step();
    if (!std::isfinite(report.loss)) {
      throw UserError("the loss is no longer finite at step " + std::to_string(step) + ": try a lower --learning-rate");
    }
    metrics.add(report);
    progress.update(step, report.loss);
    const bool look = command.eval_every > 0 && (step % command.eval_every == 0 || step == steps);
    if (look || step % kStepsPerRow == 0 || step == steps) {
      metrics.write_row(step * command.recipe.batch_size, progress.images_per_second(),
                        look ? std::optional(quick_knn(pretrainer, dataset)) : std::nullopt);
    }
  }
  save_checkpoint(command.out / kCheckpointFile, pretrainer);
  std::cout << (command.out / kCheckpointFile).string() << '\n';
}

}  // namespace m2teacher
