#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>

namespace m2teacher {

/// Reads an IDX file of unsigned bytes (the format of MNIST), gzip-compressed or not.
///
/// @return uint8, of the sizes that the file's header gives
/// @throws UserError  the file cannot be read, is no IDX file of bytes, or is shorter or longer than its header says
at::Tensor read_idx(const std::filesystem::path& path);

}  // namespace m2teacher
