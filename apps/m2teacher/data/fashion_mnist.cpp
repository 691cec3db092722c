#include "data/fashion_mnist.h"

#include "data/idx.h"
#include "error.h"

#include <array>
#include <string>

namespace m2teacher {
namespace {

constexpr std::array<const char*, 10> kClassNames = {"T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
                                                     "Sandal",      "Shirt",   "Sneaker",  "Bag",   "Ankle boot"};

std::filesystem::path find_file(const std::filesystem::path& folder, const std::string& name) {
  for (const auto& candidate : {folder / name, folder / (name + ".gz")}) {
    if (std::filesystem::exists(candidate)) {
      return candidate;
    }
  }
  throw UserError(folder.string() + ": has neither " + name + " nor " + name + ".gz");
}

ImageSet load_set(const std::filesystem::path& folder, const std::string& prefix) {
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
  const auto largest = labels.max().item<int64_t>();
  if (largest >= static_cast<int64_t>(kClassNames.size())) {
    throw UserError(labels_path.string() + ": holds label " + std::to_string(largest) + ", expected 0 to " +
                    std::to_string(kClassNames.size() - 1));
  }
  return {images.unsqueeze(1), labels.to(at::kLong)};
}

}  // namespace

Dataset load_fashion_mnist(const std::filesystem::path& folder) {
  if (!std::filesystem::is_directory(folder)) {
    throw UserError(folder.string() + ": no such folder (expected one that holds Fashion-MNIST's IDX files)");
  }
  Dataset dataset{load_set(folder, "train"), load_set(folder, "t10k"), {kClassNames.begin(), kClassNames.end()}};
  if (dataset.train.images.sizes().slice(1) != dataset.test.images.sizes().slice(1)) {
    throw UserError(folder.string() + ": training and test images differ in size");
  }
  return dataset;
}

}  // namespace m2teacher
