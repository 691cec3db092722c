#pragma once

#include "kernels/cpu/kernels.h"

#include <cstddef>
#include <vector>

// The kernels' results from their formulas, in float64: what the tests compare with.

namespace momentum_bn::kernels::test {

struct Statistics {
  std::vector<double> mean;
  std::vector<double> m2;  // sum of squared deviations
};

/// Of each channel.
Statistics statistics(const Shape& shape, const std::vector<double>& x);

struct Coefficients {
  std::vector<double> center;
  std::vector<double> scale;
  std::vector<double> shift;
};

/// (x - center) * scale + shift + residual (which may be empty), then torch's relu, which keeps NaN.
std::vector<double> normalised(const Shape& shape, const std::vector<double>& x, const Coefficients& coefficients,
                               const std::vector<double>& residual, bool relu);

struct Gradients {
  std::vector<double> dx;
  std::vector<double> dresidual;
  std::vector<double> sum_g;
  std::vector<double> sum_gx;
};

/// y may be empty: no mask. With constant statistics.
Gradients gradients(const Shape& shape, const std::vector<double>& dy, const std::vector<double>& x,
                    const std::vector<double>& y, const Coefficients& coefficients);

/// A layer's arrays of channels.
struct LayerArrays {
  /// Six rows: center, what it lost to rounding, 1 / deviation, mean that normalises less the batch's, m / n, m * c /
  /// n.
  std::vector<double> saved;
  std::vector<double> weight;  // or empty

  double row(int64_t row, size_t channel) const {
    return saved[static_cast<size_t>(row) * (saved.size() / 6) + channel];
  }
};

/// Through the statistics; sum_gx is around the mean that normalises.
Gradients gradients_through_statistics(const Shape& shape, const std::vector<double>& dy, const std::vector<double>& x,
                                       const std::vector<double>& y, const LayerArrays& layer);

}  // namespace momentum_bn::kernels::test
