#pragma once

#include "models/normalisation.h"

namespace m2teacher {

/// Momentum BatchNorm as its authors published it (github.com/zengarden/momentum2-teacher): the formulas written out in
/// eager tensor operations, residual and ReLU after them. For comparison only.
NormFactory published_norm();

}  // namespace m2teacher
