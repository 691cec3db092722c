#include "cli/cli.h"

#include "keep_freed_memory.h"

int main(int argc, char** argv) {
  m2teacher::keep_freed_memory();
  return m2teacher::run(argc, argv);
}
