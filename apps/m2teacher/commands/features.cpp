#include "commands/features.h"

#include "output/atomic_file.h"
#include "output/npy.h"

#include <iostream>

namespace m2teacher {
namespace {

void write_set(const FeaturesCommand& command, const Evaluation& evaluation, const Encoder& encoder,
               const std::shared_ptr<const ImageSource>& images, const std::string& set) {
  const auto write = [&](const std::string& what, const at::Tensor& values) {
    const std::filesystem::path path = command.out / (set + "-" + what + ".npy");
    write_npy(path, values);
    std::cout << path.string() << '\n';
  };
  const LabelledFeatures found = evaluation.features(encoder, images);
  write("features", found.features);
  if (found.labels.defined()) {
    write("labels", found.labels);
  }
}

}  // namespace

void run_features(const FeaturesCommand& command) {
  const Evaluation evaluation = open_evaluation(command.source);
  const Encoder encoder = build_encoder(evaluation.checkpoint, command.side);
  make_writable_folder(command.out);
  write_set(command, evaluation, encoder, evaluation.dataset.train, "train");
  if (evaluation.dataset.test) {
    write_set(command, evaluation, encoder, evaluation.dataset.test, "test");
  }
}

}  // namespace m2teacher
