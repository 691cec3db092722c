#pragma once

#include "models/encoder.h"
#include "output/metrics.h"
#include "settings/run_settings.h"
#include "training/pretrainer.h"

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <ostream>
#include <string>

namespace m2teacher {

/// What a run was trained on, by which other images are recognised.
struct TrainedOn {
  int64_t images = 0;
  ImageShape shape;
  PixelStatistics pixels;  ///< what the encoder's input is standardised by

  bool operator==(const TrainedOn&) const = default;
};

/// As "60000 images of 1 x 28 x 28".
std::string describe(const TrainedOn& images);

/// A run as it stood after a step, whole: whoever has the images can go on with it.
struct Checkpoint {
  std::filesystem::path path;  ///< where it was read from
  RunSettings settings;        ///< with nothing left open
  TrainedOn trained_on;
  MetricsState metrics;
  std::map<std::string, at::Tensor> state;  ///< `Pretrainer::state()`

  int64_t step() const;
};

/// Writes a checkpoint as a safetensors file with a checksum, whole or not at all. @throws UserError
void save_checkpoint(const std::filesystem::path& path, const Checkpoint& checkpoint);

/// @throws UserError  the file is damaged, however slightly, or no checkpoint
Checkpoint read_checkpoint(const std::filesystem::path& path);

/// The newest checkpoint in the folder of a run that is whole. Says on `notes` which damaged ones it skips.
/// @return none where there is none
/// @throws ReadError  one cannot be read, which may be whole
std::optional<Checkpoint> newest_checkpoint(const std::filesystem::path& folder, std::ostream& notes);

/// A checkpoint by its file's name or by that of its run's folder, then the newest whole one. @throws UserError
Checkpoint open_checkpoint(const std::filesystem::path& path, std::ostream& notes);

/// An encoder for evaluation, with torch's BatchNorm in evaluation mode.
/// @param side  which of the two networks
/// @throws UserError  the checkpoint's tensors are not those of the model that it describes
Encoder build_encoder(const Checkpoint& checkpoint, BranchImpl::Side side);

}  // namespace m2teacher
