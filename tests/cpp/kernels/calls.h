#pragma once

#include "buffer.h"
#include "call_inputs.h"
#include "kernels/cpu/kernels.h"
#include "oracle.h"
#include "threads.h"

#include <string>
#include <vector>

// One call of a kernel each: values in, values out, with the checks that belong to every call.

namespace momentum_bn::kernels::test {

/// The scale and shift (around the mean).
struct ScaleAndShift {
  double scale;
  double shift;
};

/// What a channel's m2 leads to: scale = weight / sqrt(variance + eps), shift = bias.
struct BlendRule {
  double eps;
  double count;  // of values, by which the variance is found from m2
  // Of channels, in the type that the kernels keep coefficients in.
  std::vector<double> weight;
  std::vector<double> bias;

  ScaleAndShift operator()(int64_t channel, double m2) const;
};

struct ForwardCall : ForwardInputs {
  ParallelFor parallel_for = serial;
};

struct ForwardResult {
  std::vector<double> y;
  std::vector<double> mean;
  std::vector<double> m2;
  /// As the kernel has them, rounded to its type.
  Coefficients coefficients;
};

/// Expects that each channel is blended once and that nothing but the outputs is written.
ForwardResult run_forward(const KernelTable& table, const ForwardCall& call, const BlendRule& rule);

/// The same with these statistics.
ForwardResult run_forward_with(const KernelTable& table, const ForwardCall& call, const BlendRule& rule,
                               const std::vector<double>& mean, const std::vector<double>& m2);

/// Expects that nothing but mean and m2 is written, which are all there is in the result.
ForwardResult run_statistics(const KernelTable& table, const ForwardCall& call);

/// With the coefficients given; `mean` and `m2` of the result are empty.
ForwardResult run_normalize(const KernelTable& table, const ForwardCall& call, const Coefficients& coefficients);

/// y from rows of `saved`; weight and bias may be empty.
ForwardResult run_normalize(const KernelTable& table, const ForwardCall& call, const std::vector<double>& saved,
                            const std::vector<double>& weight, const std::vector<double>& bias);

/// What forward() saves, normalised by the batch with its biased variance. The rule's weight and bias may be empty.
std::vector<double> saved_by_forward(const KernelTable& table, const ForwardCall& call, const BlendRule& rule,
                                     int saved_rows);

/// Weights within +-1, the first channel with weight 1 and bias 0.
BlendRule layer_rule(Type type, const Shape& shape, double eps = 1e-5);

/// How the gradient of x is formed.
enum class Gradient {
  kConstantStatistics,
  kThroughStatistics,
  kThroughStatisticsInHalves,
};

struct BackwardCall : BackwardInputs {
  Gradient gradient = Gradient::kConstantStatistics;
  /// The mask is made from x; y is not given.
  bool mask_from_x = false;
  /// [3 or 6][channels], in the type that the kernels keep them in.
  std::vector<double> saved = {};
  std::vector<double> weight = {};  // or empty
  std::vector<double> bias = {};    // or empty
  ParallelFor parallel_for = serial;
};

std::string describe(const BackwardCall& call);

struct BackwardResult {
  Gradients gradients;  // sum_gx is empty where there is no x, dx and dresidual where they were not asked for
  std::vector<double> dweight;
  std::vector<double> dbias;
};

/// Expects that nothing but the outputs is written.
BackwardResult run_backward(const KernelTable& table, const BackwardCall& call);

/// With `saved` from these coefficients, without a weight.
BackwardResult run_backward(const KernelTable& table, BackwardCall call, const Coefficients& coefficients);

}  // namespace momentum_bn::kernels::test
