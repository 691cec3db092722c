#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>

namespace m2teacher {

/// Writes an array as NumPy's `numpy.save` does (format version 1.0), whole or not at all.
/// @param tensor  float32 or int64, any shape and strides
/// @throws UserError              it cannot be written
/// @throws std::invalid_argument  another dtype
void write_npy(const std::filesystem::path& path, const at::Tensor& tensor);

}  // namespace m2teacher
