#include "commands/unreadable.h"

#include "text/printable.h"

#include <iostream>

namespace m2teacher {

void warn(const std::vector<std::string>& notes) {
  for (const std::string& note : notes) {
    std::cerr << "m2teacher: warning: " << printable(note) << '\n';
  }
}

void report_unreadable(const ImageSource& images) {
  const int64_t count = images.unreadable();
  if (count > 0) {
    std::cerr << count << " of " << images.size() << " images could not be read and were passed over\n";
  }
}

}  // namespace m2teacher
