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

/// As `write_safetensors`, with a checksum over every byte of the file under "checksum" in its metadata, the first
/// thing in the header. Other readers of the format see one more entry of metadata. The tensors must not change
/// meanwhile.
void write_checked_safetensors(const std::filesystem::path& path, const Safetensors& contents);

/// As `read_safetensors`, of what `write_checked_safetensors` has written: the checksum is verified before anything
/// else is looked at.
/// @return metadata without the checksum
/// @throws UserError  also where a single bit of the file is another than was written
Safetensors read_checked_safetensors(const std::filesystem::path& path);

}  // namespace m2teacher
