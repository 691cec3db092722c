#pragma once

#include "kernels/shape.h"

#include <cstdint>
#include <string>
#include <vector>

// What calls of forward and backward kernels are given on any device, and values to call them with.

namespace momentum_bn::kernels::test {

struct ForwardInputs {
  Type type = Type::kFloat;
  Shape shape = {};
  std::vector<double> x;
  std::vector<double> residual;  // or empty
  bool relu = false;
  bool in_place = false;
  /// Values that x, residual and y lie behind an aligned address.
  int64_t offset = 0;
};

struct BackwardInputs {
  Type type = Type::kFloat;
  Shape shape = {};
  std::vector<double> dy;
  std::vector<double> x;  // or empty: no gradient of the weight
  std::vector<double> y;  // or empty: no mask
  bool with_dx = true;
  bool with_dresidual = false;
  bool in_place = false;  // dx in dy
  /// Values that dy, x, y and the results lie behind an aligned address.
  int64_t offset = 0;
};

std::string describe(const ForwardInputs& inputs);
std::string describe(const BackwardInputs& inputs);

/// x: unit noise around `mean`, the channels a little apart.
ForwardInputs forward_inputs(Type type, const Shape& shape, double mean);

/// x around `mean`, y of both signs and zero, dy with a part along x so that no sum of a channel cancels.
BackwardInputs backward_inputs(Type type, const Shape& shape, double mean);

}  // namespace momentum_bn::kernels::test
