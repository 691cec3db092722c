#pragma once

#include "data/image_set.h"

#include <filesystem>

namespace m2teacher {

/// Where Debian's package dataset-fashion-mnist puts the files.
inline constexpr const char* kFashionMnistFolder = "/usr/share/datasets/fashion-mnist";

/// Reads Fashion-MNIST: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
/// t10k-labels-idx1-ubyte in `folder`, each with or without ".gz".
///
/// @throws UserError  a file is missing or damaged, or the files do not fit each other
Dataset load_fashion_mnist(const std::filesystem::path& folder);

}  // namespace m2teacher
