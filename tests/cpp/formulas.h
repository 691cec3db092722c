#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

/// A forward and a backward pass from the formulas of the layers, value by value in long double, and how far rounding
/// may take a layer from them. Shares no code with the product.
namespace momentum_bn::formulas {

/// Numbers and what each may be off before it is rounded to the type that it is kept in.
struct Near {
  std::vector<double> value;
  std::vector<double> tolerance;

  explicit Near(size_t size = 0) : value(size), tolerance(size) {}
  void set(size_t i, long double of, long double within) {
    value[i] = static_cast<double>(of);
    tolerance[i] = static_cast<double>(within);
  }
};

/// Of the arithmetic that a layer computes in.
struct Precision {
  /// Of a sum of products, relative to the sum of their magnitudes.
  double relative;
  /// Of a value's distance from the mean, relative to the value.
  double centering;
  /// Of a sum of two rounded values, where the sum before was rounded to the output's type.
  double intermediate = 0;
};

/// Values of a tensor in the order of its (N, C, values of a plane).
struct Shape {
  int64_t outer;
  int64_t channels;
  int64_t inner;

  double values_per_channel() const { return static_cast<double>(outer * inner); }
  size_t size() const { return static_cast<size_t>(outer * channels * inner); }
  /// run(index of the value) for all values of a channel.
  template <typename Run>
  void for_channel(int64_t channel, const Run& run) const {
    for (int64_t i = 0; i < outer; ++i) {
      for (int64_t k = 0; k < inner; ++k) {
        run(static_cast<size_t>((i * channels + channel) * inner + k));
      }
    }
  }
};

struct Inputs {
  Shape shape;
  std::vector<double> x;
  std::vector<double> residual;  // or empty
  std::vector<double> weight;    // (C), or empty
  std::vector<double> bias;      // (C), or empty
  double eps;
  bool relu;
};

/// Everything that the next output depends on.
struct State {
  Near running_mean;
  Near running_var;
  Near view_mean_sum;
  Near view_var_sum;
  int64_t num_batches_tracked = 0;
  int64_t view_count = 0;
  int64_t cur_iter = 0;
  std::optional<double> momentum;
};

/// What normalises a channel.
struct Normaliser {
  long double mean;
  long double deviation;  // with eps
  long double batch_mean = 0;
  long double batch_deviation = 0;
  long double of_mean = 0;      // d * m / n: the share of the gradients that flows through the batch's mean
  long double of_variance = 0;  // d * m * c / n: and through its variance
};

/// The batch's mean and unbiased variance.
struct BatchStatistics {
  std::vector<long double> mean;
  std::vector<long double> var;
  std::vector<double> largest;  // |x|
};

inline BatchStatistics batch_statistics(const Shape& shape, const std::vector<double>& x) {
  BatchStatistics batch;
  for (int64_t c = 0; c < shape.channels; ++c) {
    long double sum = 0;
    long double squares = 0;
    double largest = 0;
    shape.for_channel(c, [&](size_t i) {
      sum += x[i];
      largest = std::max(largest, std::abs(x[i]));
    });
    const long double mean = sum / shape.values_per_channel();
    shape.for_channel(c, [&](size_t i) { squares += (x[i] - mean) * (x[i] - mean); });
    batch.mean.push_back(mean);
    batch.var.push_back(squares / (shape.values_per_channel() - 1));
    batch.largest.push_back(largest);
  }
  return batch;
}

/// What makes of the unbiased variance the one that normalises.
inline double factor_to_normalise(double n, const std::string& variance) {
  return variance == "published" ? n / (n - 1) : variance == "unbiased" ? 1 : (n - 1) / n;
}

/// What makes of it the one that enters the running variance.
inline double factor_to_keep(double n, const std::string& variance) {
  return variance == "published" ? n / (n - 1) : 1;
}

inline double cosine_schedule(int64_t cur_iter, int64_t total_iters) {
  const double progress = static_cast<double>(std::min(cur_iter, total_iters)) / static_cast<double>(total_iters);
  return (std::cos(M_PI * progress) + 1) / 2;
}

/// What a training forward makes of the state. @param m  weight of the batch in the running statistics
inline void update(State& state, const BatchStatistics& batch, double n, double m, const Precision& precision,
                   int64_t views_per_update, const std::string& variance) {
  const auto views = static_cast<double>(++state.view_count);
  const bool complete = state.view_count == views_per_update;
  ++state.num_batches_tracked;
  for (size_t c = 0; c < batch.mean.size(); ++c) {
    const long double mean_lost = precision.centering * batch.largest[c] + precision.relative * std::sqrt(batch.var[c]);
    // Its terms are squares, which lose twice what their roots do.
    const long double var_lost =
        precision.relative * batch.var[c] + std::pow(precision.centering * batch.largest[c], 2);
    // Keeps the old value and adds the new one, with the tolerance of both.
    const auto blend = [&](Near& of, double keep, long double add, long double lost) {
      const long double kept = keep * of.value[c];
      of.set(c, kept + add, precision.relative * (std::abs(kept) + std::abs(add)) + lost);
    };
    blend(state.view_mean_sum, 1, batch.mean[c], mean_lost);
    blend(state.view_var_sum, 1, batch.var[c], var_lost);
    if (!complete) {
      continue;
    }
    const long double view_mean = state.view_mean_sum.value[c] / views;
    const long double view_var = state.view_var_sum.value[c] / views * factor_to_keep(n, variance);
    blend(state.running_mean, 1 - m, m * view_mean, m * mean_lost);
    blend(state.running_var, 1 - m, m * view_var, m * var_lost);
    state.view_mean_sum.set(c, 0, 0);
    state.view_var_sum.set(c, 0, 0);
  }
  if (complete) {
    state.view_count = 0;
    ++state.cur_iter;
  }
}

/// One channel's part of a tensor, with the magnitudes that rounding goes by.
class Channel {
 public:
  Channel(const Inputs& inputs, const Precision& precision, const Normaliser& normaliser, int64_t channel)
      : inputs_(inputs),
        precision_(precision),
        normaliser_(normaliser),
        weight_(inputs.weight.empty() ? 1 : inputs.weight[static_cast<size_t>(channel)]),
        bias_(inputs.bias.empty() ? 0 : inputs.bias[static_cast<size_t>(channel)]) {}

  long double weight() const { return weight_; }
  long double distance(size_t i) const { return inputs_.x[i] - normaliser_.mean; }
  /// The magnitudes behind a distance: rounding loses `relative` of them.
  long double spread(size_t i) const {
    const long double magnitudes = std::abs(inputs_.x[i]) + std::abs(normaliser_.mean);
    // A layer keeps the mean in two numbers, the first in steps that go by the deviation.
    const long double second_rounding = 16 * precision_.relative * normaliser_.deviation;
    return std::abs(distance(i)) + normaliser_.batch_deviation + second_rounding +
           precision_.centering / precision_.relative * magnitudes;
  }

  /// Before the activation.
  long double output(size_t i) const { return distance(i) / normaliser_.deviation * weight_ + bias_ + residual(i); }
  long double output_tolerance(size_t i) const {
    const long double without_residual = spread(i) / normaliser_.deviation * std::abs(weight_) + std::abs(bias_);
    return precision_.relative * (without_residual + std::abs(residual(i))) +
           (inputs_.residual.empty() ? 0 : precision_.intermediate * std::abs(output(i) - residual(i)));
  }

 private:
  long double residual(size_t i) const { return inputs_.residual.empty() ? 0 : inputs_.residual[i]; }

  const Inputs& inputs_;
  const Precision& precision_;
  const Normaliser& normaliser_;
  long double weight_;
  long double bias_;
};

/// activation((x - mean) / deviation * weight + bias + residual).
inline Near output(const Inputs& inputs, const Precision& precision, const std::vector<Normaliser>& normalisers) {
  Near y(inputs.shape.size());
  for (int64_t c = 0; c < inputs.shape.channels; ++c) {
    const Channel channel(inputs, precision, normalisers[static_cast<size_t>(c)], c);
    inputs.shape.for_channel(c, [&](size_t i) {
      const long double value = channel.output(i);
      y.set(i, inputs.relu && value < 0 ? 0 : value, channel.output_tolerance(i));
    });
  }
  return y;
}

struct Gradients {
  Near dx;
  Near dresidual;
  Near dweight;
  Near dbias;
};

/// dx = weight / deviation * [g - d * m / n * S0 - d * m * c / n * (x - batch_mean) * S1 / deviation^2],
/// dweight = S1 / deviation, dbias = S0, dresidual = g, with S0 and S1 the sums of g and of g * (x - mean).
/// @param g  through the activation's mask
inline Gradients gradients(const Inputs& inputs, const Precision& precision, const std::vector<Normaliser>& normalisers,
                           const std::vector<double>& g) {
  const auto channels = static_cast<size_t>(inputs.shape.channels);
  Gradients result = {Near(g.size()), Near(g.size()), Near(channels), Near(channels)};
  result.dresidual.value = g;
  const double relative = precision.relative;
  for (size_t c = 0; c < channels; ++c) {
    const Normaliser& by = normalisers[c];
    const Channel channel(inputs, precision, by, static_cast<int64_t>(c));
    long double sum = 0;
    long double sum_of_magnitudes = 0;
    long double product = 0;
    long double product_of_magnitudes = 0;
    inputs.shape.for_channel(static_cast<int64_t>(c), [&](size_t i) {
      sum += g[i];
      sum_of_magnitudes += std::abs(g[i]);
      product += g[i] * channel.distance(i);
      product_of_magnitudes += std::abs(g[i]) * channel.spread(i);
    });
    result.dweight.set(c, product / by.deviation, relative * product_of_magnitudes / by.deviation);
    result.dbias.set(c, sum, relative * sum_of_magnitudes);
    const long double scale = channel.weight() / by.deviation;
    const long double of_variance = by.of_variance / (by.deviation * by.deviation);
    // A layer forms x - batch_mean as (x - mean) + (mean - batch_mean).
    const long double apart = std::abs(by.mean - by.batch_mean);
    inputs.shape.for_channel(static_cast<int64_t>(c), [&](size_t i) {
      const long double dx = g[i] - by.of_mean * sum - of_variance * (inputs.x[i] - by.batch_mean) * product;
      const long double magnitude = std::abs(g[i]) + by.of_mean * sum_of_magnitudes +
                                    of_variance * (channel.spread(i) + apart) * product_of_magnitudes;
      result.dx.set(i, scale * dx, relative * std::abs(scale) * magnitude);
    });
  }
  return result;
}

}  // namespace momentum_bn::formulas
