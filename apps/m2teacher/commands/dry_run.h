#pragma once

#include "settings/run_settings.h"

namespace m2teacher {

/// Takes the steps of a recipe on meta tensors, which have shapes, dtypes and devices but no values: a step that reads
/// a number from the device, or that mixes devices, fails as it must. Reads images, computes nothing, writes nothing.
/// @param settings  with the number of steps
/// @throws UserError
void run_dry(const RunSettings& settings);

}  // namespace m2teacher
