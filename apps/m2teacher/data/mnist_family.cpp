#include "data/mnist_family.h"

#include "data/idx.h"
#include "error.h"

#include <string>

namespace m2teacher {
namespace {

std::filesystem::path find_file(const std::filesystem::path& folder, const std::string& name) {
  for (const auto& candidate : {folder / name, folder / (name + ".gz")}) {
    if (std::filesystem::exists(candidate)) {
      return candidate;
    }
  }
  throw UserError(folder.string() + ": has neither " + name + " nor " + name + ".gz");
}

std::shared_ptr<TensorSource> load_set(const std::filesystem::path& folder, const std::string& prefix) {
  const auto images_path = find_file(folder, prefix + "-images-idx3-ubyte");
  const auto labels_path = find_file(folder, prefix + "-labels-idx1-ubyte");
  const at::Tensor images = read_idx(images_path);
  const at::Tensor labels = read_idx(labels_path);
  if (images.dim() != 3 || images.numel() == 0) {
    throw UserError(images_path.string() + ": expected images (three dimensions, none empty), found " +
                    std::to_string(images.dim()) + " dimensions and " + std::to_string(images.numel()) + " values");
  }
  if (labels.dim() != 1) {
    throw UserError(labels_path.string() + ": expected labels (one dimension), found " + std::to_string(labels.dim()) +
                    " dimensions");
  }
  if (images.size(0) != labels.size(0)) {
    throw UserError(labels_path.string() + ": holds " + std::to_string(labels.size(0)) + " labels for " +
                    std::to_string(images.size(0)) + " images");
  }
  return std::make_shared<TensorSource>(images.unsqueeze(1), labels.to(at::kLong));
}

}  // namespace

Dataset load_mnist_family(const std::filesystem::path& folder) {
  const auto train = load_set(folder, "train");
  const auto test = load_set(folder, "t10k");
  if (train->shape() != test->shape()) {
    throw UserError(folder.string() + ": training and test images differ in size");
  }
  return {.train = train,
          .test = test,
          .class_names = numbered_classes({train->labels(), test->labels()}),
          .pixels = pixel_statistics(train->in_memory())};
}

}  // namespace m2teacher
