#pragma once

#include "data/image_source.h"

namespace m2teacher {

/// Says on stderr how many images of a source turned out to be unreadable, if any did.
void report_unreadable(const ImageSource& images);

}  // namespace m2teacher
