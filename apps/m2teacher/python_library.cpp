// The trainer for `python -m momentum_bn.m2teacher`: one C function of a shared library.

#include "cli/cli.h"

#include "keep_freed_memory.h"

#include <iostream>

/// @param process_group  name of the c10d process group whose ranks all call this; empty: this process alone
/// @return the exit code
extern "C" __attribute__((visibility("default"))) int m2teacher_run(int argc, const char* const* argv,
                                                                    const char* process_group) {
  m2teacher::keep_freed_memory();
  const int code = m2teacher::run(argc, argv, process_group);
  std::cout.flush();
  return code;
}
