#include "commands/unreadable.h"

#include <iostream>

namespace m2teacher {

void report_unreadable(const ImageSource& images) {
  const int64_t count = images.unreadable();
  if (count > 0) {
    std::cerr << count << " of " << images.size() << " images could not be read and were passed over\n";
  }
}

}  // namespace m2teacher
