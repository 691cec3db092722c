#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace m2teacher {

enum class Architecture {
  Small,     ///< "small": one basic block per stage, for images as small as MNIST's
  ResNet18,  ///< "resnet18" (arXiv 1512.03385, table 1), under torchvision's names
  ResNet50,  ///< "resnet50", with the stride in the 3x3 convolution, as torchvision has it
};

/// How a ResNet begins.
enum class Stem {
  Standard,  ///< "standard": 7x7 convolution of stride 2, then a 3x3 max pool of stride 2
  Small,     ///< "small": 3x3 convolution of stride 1, no pool, for images of up to 64 pixels (arXiv 2002.05709, B.9)
};

/// The word for it. `parse_*` throw UserError for an unknown one.
std::string to_string(Architecture architecture);
std::string to_string(Stem stem);
Architecture parse_architecture(const std::string& word);
Stem parse_stem(const std::string& word);

struct EncoderOptions {
  Architecture architecture = Architecture::ResNet50;  ///< the paper's
  int64_t in_channels = 3;                             ///< set by the images
  std::optional<Stem> stem;                            ///< of a ResNet; unset: small for images of up to 64 pixels

  /// Of the small encoder: channels of each stage. The first keeps the resolution of the stem, every further one halves
  /// it.
  std::vector<int64_t> widths = {32, 64, 128};
  /// Of the small encoder: its output is averaged over a grid of pool x pool fields; more than 1 keeps roughly where
  /// things are.
  int64_t pool = 2;

  /// Length of what the encoder gives for an image.
  int64_t features() const;
};

}  // namespace m2teacher
