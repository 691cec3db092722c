#include "oracle.h"

#include <cstddef>

namespace momentum_bn::kernels::test {
namespace {

/// run(index of the value, channel) for all values.
template <typename Run>
void for_values(const Shape& shape, const Run& run) {
  size_t i = 0;
  for (int64_t outer = 0; outer < shape.outer; ++outer) {
    for (size_t channel = 0; channel < static_cast<size_t>(shape.channels); ++channel) {
      for (int64_t inner = 0; inner < shape.inner; ++inner) {
        run(i++, channel);
      }
    }
  }
}

std::vector<double> as_double(const std::vector<long double>& values) { return {values.begin(), values.end()}; }

}  // namespace

// Sums in long double: the oracle's own rounding must not count beside that of the double kernels.

Statistics statistics(const Shape& shape, const std::vector<double>& x) {
  const auto n = static_cast<long double>(shape.values_per_channel());
  std::vector<long double> mean(static_cast<size_t>(shape.channels));
  std::vector<long double> m2(static_cast<size_t>(shape.channels));
  for_values(shape, [&](size_t i, size_t c) { mean[c] += x[i]; });
  for (auto& value : mean) {
    value /= n;
  }
  for_values(shape, [&](size_t i, size_t c) { m2[c] += (x[i] - mean[c]) * (x[i] - mean[c]); });
  return {as_double(mean), as_double(m2)};
}

std::vector<double> normalised(const Shape& shape, const std::vector<double>& x, const Coefficients& coefficients,
                               const std::vector<double>& residual, bool relu) {
  std::vector<double> y(x.size());
  for_values(shape, [&](size_t i, size_t c) {
    y[i] = (x[i] - coefficients.center[c]) * coefficients.scale[c] + coefficients.shift[c];
    if (!residual.empty()) {
      y[i] += residual[i];
    }
    if (relu && y[i] <= 0) {
      y[i] = 0;
    }
  });
  return y;
}

Gradients gradients(const Shape& shape, const std::vector<double>& dy, const std::vector<double>& x,
                    const std::vector<double>& y, const Coefficients& coefficients) {
  Gradients result = {std::vector<double>(dy.size()), std::vector<double>(dy.size()), {}, {}};
  std::vector<long double> sum_g(static_cast<size_t>(shape.channels));
  std::vector<long double> sum_gx(static_cast<size_t>(shape.channels));
  for_values(shape, [&](size_t i, size_t c) {
    const double g = y.empty() || !(y[i] <= 0) ? dy[i] : 0;
    result.dx[i] = g * coefficients.scale[c];
    result.dresidual[i] = g;
    sum_g[c] += g;
    sum_gx[c] += static_cast<long double>(g) * (static_cast<long double>(x[i]) - coefficients.center[c]);
  });
  result.sum_g = as_double(sum_g);
  result.sum_gx = as_double(sum_gx);
  return result;
}

Gradients gradients_through_statistics(const Shape& shape, const std::vector<double>& dy, const std::vector<double>& x,
                                       const std::vector<double>& y, const LayerArrays& layer) {
  Coefficients around_mean = {{}, std::vector<double>(static_cast<size_t>(shape.channels), 1), {}};
  for (size_t c = 0; c < around_mean.scale.size(); ++c) {
    around_mean.center.push_back(layer.row(0, c) + layer.row(1, c));
  }
  Gradients result = gradients(shape, dy, x, y, around_mean);
  for_values(shape, [&](size_t i, size_t c) {
    const long double rstd = layer.row(2, c);
    const long double batch_mean = around_mean.center[c] - layer.row(3, c);
    const long double of_mean = layer.row(4, c) * result.sum_g[c];
    const long double of_variance = layer.row(5, c) * (x[i] - batch_mean) * result.sum_gx[c] * rstd * rstd;
    const long double weight = layer.weight.empty() ? 1 : layer.weight[c];
    result.dx[i] = static_cast<double>(weight * rstd * (result.dresidual[i] - of_mean - of_variance));
  });
  return result;
}

}  // namespace momentum_bn::kernels::test
