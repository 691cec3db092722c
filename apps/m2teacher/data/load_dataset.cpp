#include "data/load_dataset.h"

#include "data/mnist_family.h"
#include "error.h"

namespace m2teacher {

Dataset load_dataset(const DataOptions& options) {
  const std::filesystem::path& folder = options.spec.folder;
  if (!std::filesystem::is_directory(folder)) {
    throw UserError(folder.string() + ": no such folder (expected one that holds the images)");
  }
  switch (options.spec.kind) {
    case DataSpec::Kind::Idx:
      return load_mnist_family(folder);
    case DataSpec::Kind::Cifar10:
    case DataSpec::Kind::Folder:
      break;
  }
  throw UserError("--data: " + to_string(options.spec) + ": not implemented yet");
}

}  // namespace m2teacher
