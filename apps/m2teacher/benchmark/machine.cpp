#include "benchmark/machine.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/version.h>

#include <dlfcn.h>
#include <gnu/libc-version.h>

#include <fstream>
#include <utility>

namespace m2teacher {
namespace {

std::string processor() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("model name")) {
      return line.substr(line.find(':') + 2);
    }
  }
  return "unknown processor";
}

/// Known by a function that only this allocator has, as they are loaded ahead of the C library.
std::string allocator() {
  for (const auto& [symbol, name] :
       {std::pair{"mallctl", "jemalloc"}, std::pair{"tc_version", "tcmalloc"}, std::pair{"mi_version", "mimalloc"}}) {
    if (dlsym(RTLD_DEFAULT, symbol) != nullptr) {
      return name;
    }
  }
  return std::string("glibc ") + gnu_get_libc_version();
}

}  // namespace

std::string describe_machine() {
  return processor() + ", " + std::to_string(at::get_num_threads()) + " threads, allocator " + allocator() +
         ", torch " + TORCH_VERSION + " (" + at::get_cpu_capability() + ")";
}

}  // namespace m2teacher
