#pragma once

#include "data/decode_image.h"

#include <cstdint>
#include <filesystem>
#include <string>

namespace m2teacher {

/// Where Debian's package dataset-fashion-mnist puts the files.
inline constexpr const char* kFashionMnistFolder = "/usr/share/datasets/fashion-mnist";

/// Which images, as `--data KIND:FOLDER` names them.
struct DataSpec {
  enum class Kind {
    Idx,      ///< "idx": the four files of the MNIST family, each with or without ".gz"
    Cifar10,  ///< "cifar10": its binary version, data_batch_*.bin and test_batch.bin
    Folder,   ///< "folder": a tree of JPEG and PNG files
  };
  Kind kind = Kind::Idx;
  std::filesystem::path folder = kFashionMnistFolder;
};

/// @throws UserError  not of the form KIND:FOLDER
DataSpec parse_data_spec(const std::string& text);

/// What `parse_data_spec` takes.
std::string to_string(const DataSpec& spec);

/// How threads read images ahead of the training.
struct LoaderOptions {
  int threads = 0;               ///< 0: one per processor
  int64_t batches_ahead = 4;     ///< finished batches that may wait, at least 1
  double timeout_seconds = 300;  ///< after so long without an image the loader gives up with an error
};

/// Images and how they are read. Fields below `spec` matter for folders alone: the others are in memory, at their size.
struct DataOptions {
  DataSpec spec;
  /// Side of the square crops, in pixels (224: arXiv 2006.07733, appendix B).
  int64_t image_size = 224;
  /// Evaluation shrinks the shorter side to image_size / centre_crop, then takes the centre (224 of 256: the same
  /// paper).
  double centre_crop = 0.875;
  /// An unreadable image ends the run; otherwise it is named, counted and passed over.
  bool strict = false;
  /// An image file of more is unreadable.
  int64_t max_pixels = kMaxPixels;
  LoaderOptions loader;
};

}  // namespace m2teacher
