#pragma once

#include <ATen/core/Tensor.h>

namespace momentum_bn::cpu {

/// Asks for huge pages under a large tensor that was not written to yet, where the system leaves that to the program
/// (Linux, transparent_hugepage=madvise). Memory of this size comes fresh from the system at each allocation, and to
/// have it page by page costs more than to fill it.
void advise_huge_pages(const at::Tensor& fresh);

}  // namespace momentum_bn::cpu
