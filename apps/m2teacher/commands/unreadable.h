#pragma once

#include "data/image_source.h"

#include <string>
#include <vector>

namespace m2teacher {

/// Says on stderr what users should know, a line each.
void warn(const std::vector<std::string>& notes);

/// Says on stderr how many images could not be read, if any.
void report_unreadable(const ImageSource& images);

}  // namespace m2teacher
