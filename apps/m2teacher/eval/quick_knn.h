#pragma once

#include "data/image_source.h"
#include "training/pretrainer.h"

#include <optional>

namespace m2teacher {

/// Accuracy in percent of the teacher as it stands by nearest neighbours, on a few images of either set, drawn by the
/// run's seed and the same ones each time: enough for a curve, at under a hundredth of the time that the full
/// evaluation takes.
/// @return none where there are no labels or no test images
std::optional<double> quick_knn(const Pretrainer& pretrainer, const Dataset& dataset, const LoaderOptions& loader);

}  // namespace m2teacher
