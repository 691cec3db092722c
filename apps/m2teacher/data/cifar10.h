#pragma once

#include "data/image_source.h"

#include <filesystem>

namespace m2teacher {

/// Reads the binary version of CIFAR-10: data_batch_1.bin to data_batch_5.bin (as many as there are, at least one) and
/// test_batch.bin, with the classes' names where batches.meta.txt is there. Pixel statistics are those of the training
/// images.
///
/// @throws UserError  a file is missing, of a wrong length or holds a label beyond 9
Dataset load_cifar10(const std::filesystem::path& folder);

}  // namespace m2teacher
