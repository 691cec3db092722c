#pragma once

#include "buffer.h"
#include "call_inputs.h"
#include "kernels/cpu/kernels.h"
#include "oracle.h"
#include "threads.h"

#include <functional>
#include <vector>

// One call of a kernel each: values in, values out, with the checks that belong to every call.

namespace momentum_bn::kernels::test {

/// The scale and shift (around the mean) that a channel's mean and m2 lead to.
struct ScaleAndShift {
  double scale;
  double shift;
};
using BlendRule = std::function<ScaleAndShift(int64_t channel, double mean, double m2)>;

struct ForwardCall : ForwardInputs {
  ParallelFor parallel_for = serial;
};

struct ForwardResult {
  std::vector<double> y;
  std::vector<double> mean;
  std::vector<double> m2;
  /// As the kernel was given them, rounded to its type.
  Coefficients coefficients;
};

/// Expects that the blend is called once for each channel and that nothing but the outputs is written.
ForwardResult run_forward(const KernelTable& table, const ForwardCall& call, const BlendRule& rule);

/// Expects that nothing but mean and m2 is written, which are all there is in the result.
ForwardResult run_statistics(const KernelTable& table, const ForwardCall& call);

/// With the coefficients given; `mean` and `m2` of the result are empty.
ForwardResult run_normalize(const KernelTable& table, const ForwardCall& call, const Coefficients& coefficients);

/// scale = weight / sqrt(variance + eps), shift = bias: the layer's rule. Weights within +-1; the first
/// channel has weight 1 and bias 0.
BlendRule layer_rule(const Shape& shape, double eps = 1e-5);

struct BackwardCall : BackwardInputs {
  ParallelFor parallel_for = serial;
};

struct BackwardResult {
  Gradients gradients;  // sum_gx is empty where there is no x, dx and dresidual where they were not asked for
  Coefficients coefficients;
};

BackwardResult run_backward(const KernelTable& table, const BackwardCall& call, const Coefficients& coefficients);

}  // namespace momentum_bn::kernels::test
