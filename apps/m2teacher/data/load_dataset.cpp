#include "data/load_dataset.h"

#include "data/cifar10.h"
#include "data/image_folder.h"
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
      return load_cifar10(folder);
    case DataSpec::Kind::Folder:
      break;
  }
  return load_image_folder(options);
}

}  // namespace m2teacher
