#pragma once

#include "data/image_source.h"

#include <filesystem>

namespace m2teacher {

/// Reads a data set in the format of MNIST (Fashion-MNIST, KMNIST, EMNIST, ...): train-images-idx3-ubyte,
/// train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte in `folder`, each with or without ".gz".
/// Pixel statistics are those of the training images.
///
/// @throws UserError  a file is missing or damaged, or the files do not fit each other
Dataset load_mnist_family(const std::filesystem::path& folder);

}  // namespace m2teacher
