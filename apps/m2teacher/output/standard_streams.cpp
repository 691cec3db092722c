#include "output/standard_streams.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>
#include <string_view>

namespace m2teacher {

void open_standard_streams() {
  for (int descriptor = STDIN_FILENO; descriptor <= STDERR_FILENO; ++descriptor) {
    if (fcntl(descriptor, F_GETFD) < 0 && errno == EBADF) {
      // The lowest free number is this one. Nothing can be said of a failure.
      open("/dev/null", O_RDWR);
    }
  }
  // Otherwise errors would flush standard output, whose own failure, and the reason for it, would go unnoticed.
  std::cerr.tie(nullptr);
}

bool standard_streams_arrived() {
  std::cerr.flush();
  errno = 0;
  std::cout.flush();
  if (!std::cout) {
    std::cerr << "m2teacher: error: standard output cannot be written"
              << (errno != 0 ? std::string(": ") + std::strerror(errno) : "") << '\n';
  }
  return std::cout && std::cerr;
}

bool stderr_is_terminal() {
  const char* kind = std::getenv("TERM");
  return isatty(STDERR_FILENO) != 0 && kind != nullptr && std::string_view(kind) != "dumb";
}

}  // namespace m2teacher
