#pragma once

#include <momentum_bn/export.h>

#include <cstdint>

// Memory of large results on the CPU. The system hands memory of tens of megabytes out page by page and empties each
// page first, which costs more than to normalise what goes into it. So the memory of results of 32 MB and more is asked
// for in huge pages and, when the tensor is freed, kept for the next result of about that size, up to a limit.

namespace momentum_bn {

/// Bytes kept now that no tensor uses.
MOMENTUM_BN_API int64_t kept_memory();

/// The most bytes that are ever kept: 1 GiB at first.
MOMENTUM_BN_API int64_t kept_memory_limit();

/// Changes the limit and gives back what lies beyond it; 0 keeps nothing.
/// @throws c10::ValueError where bytes < 0
MOMENTUM_BN_API void set_kept_memory_limit(int64_t bytes);

/// Gives all of it back to the system.
MOMENTUM_BN_API void release_kept_memory();

}  // namespace momentum_bn
