#include "commands/evaluation.h"

#include "commands/unreadable.h"
#include "device/choose_device.h"
#include "error.h"
#include "eval/draw_images.h"

#include <iostream>

namespace m2teacher {
namespace {

LabelledFeatures features_of(const Evaluation& evaluation, Encoder encoder,
                             const std::shared_ptr<const ImageSource>& images, const at::Tensor& index) {
  LabelledFeatures found =
      encode(encoder, images, index, evaluation.checkpoint.trained_on.pixels, evaluation.data.loader);
  report_unreadable(*images);
  return found;
}

}  // namespace

Encoder Evaluation::encoder(BranchImpl::Side side) const {
  Encoder encoder = build_encoder(checkpoint, side);
  encoder->to(device);
  return encoder;
}

LabelledFeatures Evaluation::features(const Encoder& encoder, const std::shared_ptr<const ImageSource>& images) const {
  return features_of(*this, encoder, images, all_images(*images));
}

LabelledFeatures Evaluation::labelled_features(const Encoder& encoder,
                                               const std::shared_ptr<const ImageSource>& images) const {
  return features_of(*this, encoder, images, labelled_images(*images));
}

Evaluation open_evaluation(const EvaluationSource& source) {
  const at::Device device = choose_device(source.device);
  if (device.is_meta()) {
    throw UserError("--device: got meta, which is for dry runs of pretrain");
  }
  Checkpoint checkpoint = open_checkpoint(source.checkpoint, std::cerr);
  DataOptions data = source.data(checkpoint.settings.data);
  Dataset dataset = load_dataset(data);
  warn(dataset.notes);
  const int64_t expected = checkpoint.trained_on.shape.channels;
  const int64_t found = dataset.train->shape().channels;
  if (found != expected) {
    throw UserError("--data: images of " + std::to_string(found) + " channels, the encoder was trained on " +
                    std::to_string(expected));
  }
  return {std::move(checkpoint), std::move(data), std::move(dataset), device};
}

Evaluation open_labelled_evaluation(const EvaluationSource& source, const std::string& purpose) {
  Evaluation evaluation = open_evaluation(source);
  if (!evaluation.dataset.test) {
    throw UserError("--data: " + to_string(evaluation.data.spec) + " has no test images, which " + purpose + " needs");
  }
  if (!evaluation.dataset.train->labels().defined() || !evaluation.dataset.test->labels().defined()) {
    throw UserError("--data: " + to_string(evaluation.data.spec) + " has no labels, which " + purpose + " needs");
  }
  return evaluation;
}

}  // namespace m2teacher
