#include "call_inputs.h"

#include "buffer.h"
#include "inputs.h"

namespace momentum_bn::kernels::test {

std::string describe(const ForwardInputs& inputs) {
  return name_of(inputs.shape) + (inputs.relu ? " relu" : "") + (inputs.residual.empty() ? "" : " residual") +
         (inputs.in_place ? " in place" : "") + " offset " + std::to_string(inputs.offset);
}

std::string describe(const BackwardInputs& inputs) {
  return name_of(inputs.shape) + (inputs.x.empty() ? " no x" : "") + (inputs.y.empty() ? "" : " mask") +
         (inputs.with_dx ? "" : " no dx") + (inputs.with_dresidual ? " dresidual" : "") +
         (inputs.in_place ? " in place" : "") + " offset " + std::to_string(inputs.offset);
}

ForwardInputs forward_inputs(Type type, const Shape& shape, double mean) {
  ForwardInputs inputs;
  inputs.type = type;
  inputs.shape = shape;
  inputs.x = unit_noise(shape.values(), 1);
  for (size_t i = 0; i < inputs.x.size(); ++i) {
    const auto channel = static_cast<int64_t>(i) / shape.inner % shape.channels;
    inputs.x[i] += mean + 0.1 * static_cast<double>(channel % 7);
  }
  inputs.x = rounded(type, inputs.x);
  return inputs;
}

BackwardInputs backward_inputs(Type type, const Shape& shape, double mean) {
  BackwardInputs inputs;
  inputs.type = type;
  inputs.shape = shape;
  inputs.x = unit_noise(shape.values(), 3);
  inputs.dy = unit_noise(shape.values(), 4);
  inputs.y = uniform(shape.values(), -1, 1, 5);
  for (size_t i = 0; i < inputs.x.size(); ++i) {
    inputs.dy[i] = 0.5 * inputs.dy[i] + 0.5 * inputs.x[i] + 0.2;
    inputs.x[i] += mean;
    if (i % 17 == 0) {
      inputs.y[i] = i % 2 ? 0.0 : -0.0;
    }
  }
  for (auto* values : {&inputs.x, &inputs.dy, &inputs.y}) {
    *values = rounded(type, *values);
  }
  return inputs;
}

}  // namespace momentum_bn::kernels::test
