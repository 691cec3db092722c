#pragma once

#include "data/data_options.h"
#include "data/image_source.h"

namespace m2teacher {

/// The images that the options name.
/// @throws UserError  a file or folder is missing or damaged
Dataset load_dataset(const DataOptions& options);

}  // namespace m2teacher
