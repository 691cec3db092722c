#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <string>

namespace m2teacher {

/// Contents of a file in the safetensors format: 8 bytes of header length, a JSON header, raw data. No code can hide in
/// it.
struct Safetensors {
  std::map<std::string, std::string> metadata;
  std::map<std::string, at::Tensor> tensors;  ///< any dtype of torch's that the format knows, any strides
};

/// Writes the file whole or not at all.
/// @throws UserError              it cannot be written
/// @throws std::invalid_argument  a dtype that the format does not know
void write_safetensors(const std::filesystem::path& path, const Safetensors& contents);

/// Reads the file and trusts nothing in it: the header must be sound and describe every byte of the data once.
/// @return contiguous tensors on the CPU
/// @throws UserError
Safetensors read_safetensors(const std::filesystem::path& path);

}  // namespace m2teacher
