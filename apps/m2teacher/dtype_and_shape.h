#pragma once

#include <ATen/core/Tensor.h>

#include <sstream>
#include <string>

namespace m2teacher {

/// For errors: "Float of shape [8, 1, 3, 3]".
inline std::string dtype_and_shape(const at::Tensor& tensor) {
  std::ostringstream text;
  text << at::toString(tensor.scalar_type()) << " of shape " << tensor.sizes();
  return text.str();
}

}  // namespace m2teacher
