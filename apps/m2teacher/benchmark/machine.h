#pragma once

#include <string>

namespace m2teacher {

/// Where a measurement was taken: processor, threads, memory allocator, torch's version and instruction set.
std::string describe_machine();

}  // namespace m2teacher
