#include "models/encoder_options.h"

#include "words.h"

namespace m2teacher {
namespace {

constexpr Words<Architecture, 3> kArchitectures = {
    {{Architecture::Small, "small"}, {Architecture::ResNet18, "resnet18"}, {Architecture::ResNet50, "resnet50"}}};
constexpr Words<Stem, 2> kStems = {{{Stem::Standard, "standard"}, {Stem::Small, "small"}}};

constexpr int64_t kResNet18Features = 512;
constexpr int64_t kResNet50Features = 2048;

}  // namespace

std::string to_string(Architecture architecture) { return word_of(kArchitectures, architecture); }
std::string to_string(Stem stem) { return word_of(kStems, stem); }
Architecture parse_architecture(const std::string& word) { return parse_word("--architecture", kArchitectures, word); }
Stem parse_stem(const std::string& word) { return parse_word("--stem", kStems, word); }

int64_t EncoderOptions::features() const {
  switch (architecture) {
    case Architecture::ResNet18:
      return kResNet18Features;
    case Architecture::ResNet50:
      return kResNet50Features;
    case Architecture::Small:
      break;
  }
  return widths.back() * pool * pool;
}

}  // namespace m2teacher
