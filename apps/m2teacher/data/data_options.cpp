#include "data/data_options.h"

#include "words.h"

namespace m2teacher {
namespace {

constexpr Words<DataSpec::Kind, 3> kDataKinds = {
    {{DataSpec::Kind::Idx, "idx"}, {DataSpec::Kind::Cifar10, "cifar10"}, {DataSpec::Kind::Folder, "folder"}}};

}  // namespace

DataSpec parse_data_spec(const std::string& text) {
  const size_t colon = text.find(':');
  if (colon == std::string::npos || colon + 1 == text.size()) {
    throw UserError("--data: got '" + text + "', expected idx:FOLDER, cifar10:FOLDER or folder:FOLDER");
  }
  return {.kind = parse_word("--data", kDataKinds, text.substr(0, colon)), .folder = text.substr(colon + 1)};
}

std::string to_string(const DataSpec& spec) { return word_of(kDataKinds, spec.kind) + ":" + spec.folder.string(); }

}  // namespace m2teacher
