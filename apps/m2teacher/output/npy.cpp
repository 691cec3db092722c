#include "output/npy.h"

#include "output/atomic_file.h"

#include <stdexcept>
#include <string>

namespace m2teacher {
namespace {

constexpr size_t kDataAlignment = 64;
constexpr size_t kLengthBytes = 2;

std::string npy_dtype(at::ScalarType dtype) {
  if (dtype == at::kFloat) {
    return "<f4";
  }
  if (dtype == at::kLong) {
    return "<i8";
  }
  throw std::invalid_argument(std::string("write_npy knows no dtype ") + at::toString(dtype));
}

/// Magic, version, length of the description, description, padded so that the data are aligned.
std::string header(const at::Tensor& tensor) {
  std::string shape;
  for (const int64_t size : tensor.sizes()) {
    shape += std::to_string(size) + ", ";
  }
  std::string description =
      "{'descr': '" + npy_dtype(tensor.scalar_type()) + "', 'fortran_order': False, 'shape': (" + shape + "), }";
  std::string text("\x93NUMPY\x01\x00", 8);
  const size_t unpadded = text.size() + kLengthBytes + description.size() + 1;
  description.append((kDataAlignment - unpadded % kDataAlignment) % kDataAlignment, ' ');
  description += '\n';
  text += static_cast<char>(description.size() & 0xFF);
  text += static_cast<char>(description.size() >> 8);
  return text + description;
}

}  // namespace

void write_npy(const std::filesystem::path& path, const at::Tensor& tensor) {
  const at::Tensor packed = tensor.detach().cpu().contiguous();
  const std::string head = header(packed);
  AtomicFile file(path);
  file.write(head.data(), head.size());
  file.write(packed.const_data_ptr(), packed.nbytes());
  file.commit();
}

}  // namespace m2teacher
