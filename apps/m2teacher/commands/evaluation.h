#pragma once

#include "checkpoint/checkpoint.h"
#include "data/load_dataset.h"
#include "eval/features.h"

#include <filesystem>
#include <functional>
#include <string>

namespace m2teacher {

/// What a command evaluates.
struct EvaluationSource {
  std::filesystem::path checkpoint;                    ///< or the folder of a run
  std::function<DataOptions(DataOptions saved)> data;  ///< the images, by those that the run was trained on
  std::string device = "auto";                         ///< as `choose_device` has it
};

/// A checkpoint with the images to try it on.
struct Evaluation {
  Checkpoint checkpoint;
  DataOptions data;
  Dataset dataset;
  at::Device device;

  /// One of the checkpoint's two encoders, on the device.
  Encoder encoder(BranchImpl::Side side) const;
  /// What the images of a set become in one of the checkpoint's encoders.
  LabelledFeatures features(const Encoder& encoder, const std::shared_ptr<const ImageSource>& images) const;
  /// The same of those images that have a label.
  LabelledFeatures labelled_features(const Encoder& encoder, const std::shared_ptr<const ImageSource>& images) const;
};

/// @throws UserError  the checkpoint or the images cannot be had, or do not fit each other
Evaluation open_evaluation(const EvaluationSource& source);

/// As `open_evaluation`, where training set and test set must be there with their labels.
/// @param purpose  named in the error
Evaluation open_labelled_evaluation(const EvaluationSource& source, const std::string& purpose);

}  // namespace m2teacher
