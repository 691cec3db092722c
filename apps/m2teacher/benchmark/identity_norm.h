#pragma once

#include "models/normalisation.h"

namespace m2teacher {

/// No normalisation, but what follows it: what a network costs without. Has weight and bias all the same, so that it
/// can follow a student. For comparison only.
NormFactory identity_norm();

}  // namespace m2teacher
