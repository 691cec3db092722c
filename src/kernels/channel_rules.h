#pragma once

#include <momentum_bn/variance.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// This file holds what the layers compute for each channel, once for the host and for devices. The functions are
// static, so that every source has a copy of its own: the CPU kernels are compiled once per instruction set, and no
// copy may stand in for another.

#ifdef __CUDACC__
#define MOMENTUM_BN_HOST_DEVICE __host__ __device__
#else
#define MOMENTUM_BN_HOST_DEVICE
#endif

namespace momentum_bn::kernels {

/// The options of a layer that are the same for all of its channels: how a batch is blended with the running
/// statistics, and how these move.
struct BlendOptions {
  double eps;
  int64_t total_iters;
  int64_t views_per_update;
  bool cosine;  // else the momentum stays where it is
  Variance variance;
};

/// The statistics of the values of one channel, or of a part of them.
struct BatchMoments {
  double mean;
  double m2;  // sum of squared deviations from the mean
  double count;
};

/// Takes the values that `other` describes into `into` (Chan, Golub, LeVeque 1979). Either may be without values.
MOMENTUM_BN_HOST_DEVICE static inline void merge(BatchMoments& into, const BatchMoments& other) {
  if (!(other.count > 0)) {
    return;
  }
  if (into.count == 0) {
    into = other;
    return;
  }
  const double count = into.count + other.count;
  const double share = other.count / count;
  const double delta = other.mean - into.mean;
  into.mean += delta * share;
  into.m2 += other.m2 + delta * delta * (into.count * share);
  into.count = count;
}

/// What the unbiased variance of n values is multiplied with before it normalises.
/// @tparam Count  double, or a tensor where only the device knows how many there are
template <typename Count>
MOMENTUM_BN_HOST_DEVICE static inline Count normalising_variance_factor(const BlendOptions& options, const Count& n) {
  switch (options.variance) {
    case Variance::Published:
      return n / (n - 1);
    case Variance::Unbiased:
      break;
    case Variance::Biased:
      return (n - 1) / n;
  }
  return n / n;
}

/// What that variance, or the mean of the views' variances, is multiplied with before it enters the running variance.
template <typename Count>
MOMENTUM_BN_HOST_DEVICE static inline Count running_variance_factor(const BlendOptions& options, const Count& n) {
  return options.variance == Variance::Published ? n / (n - 1) : n / n;
}

/// Blends the batch, which has this weight, with the running statistics: into what normalises, and what an update
/// leaves.
MOMENTUM_BN_HOST_DEVICE static inline double blended(double weight, double batch, double running) {
  return weight * batch + (1 - weight) * running;
}

/// Returns the largest power of 2 that is not above a positive value.
/// @tparam A  float or double
template <typename A>
MOMENTUM_BN_HOST_DEVICE static inline A power_of_2_in(A value) {
  using Bits = std::conditional_t<sizeof(A) == sizeof(float), uint32_t, uint64_t>;
  Bits bits;
  memcpy(&bits, &value, sizeof(bits));
  bits &= static_cast<Bits>(sizeof(A) == sizeof(float) ? 0x7f800000 : 0x7ff0000000000000);
  memcpy(&value, &bits, sizeof(bits));
  return value;
}

/// Rounds a value to the spacing of values of this magnitude, so that it can be subtracted from these without rounding.
template <typename A>
MOMENTUM_BN_HOST_DEVICE static inline A rounded_to_spacing_at(A magnitude, A value) {
  const A power = power_of_2_in(magnitude);
  const A rounded = (value + power) - power;
  return std::isfinite(rounded) ? rounded : value;
}

/// What a forward pass keeps of the statistics that a channel is normalised with. A is what values are computed in.
template <typename A>
struct SavedStatistics {
  A center;       // the mean, rounded to the spacing of the values
  A center_rest;  // what the mean lost to rounding
  A rstd;         // 1 / sqrt(variance + eps)
};

template <typename A>
MOMENTUM_BN_HOST_DEVICE static inline SavedStatistics<A> saved_statistics(const BlendOptions& options, double mean,
                                                                          double variance) {
  const double deviation = std::sqrt(variance + options.eps);
  const A nearest = static_cast<A>(mean);
  // Else all values of one power of 2 would be rounded by the same amount when the center is subtracted, and a sum over
  // them would have that error in full.
  const A center = rounded_to_spacing_at(4 * std::fabs(nearest) + 16 * static_cast<A>(deviation), nearest);
  // An infinite center has lost nothing: infinity less infinity is not a number.
  const double rest = std::isfinite(center) ? mean - static_cast<double>(center) : 0;
  return {center, static_cast<A>(rest), static_cast<A>(1 / deviation)};
}

/// y = (x - center) * scale + shift
template <typename A>
struct Coefficients {
  A center;
  A scale;
  A shift;
};

/// Forms the coefficients from what was saved alone, so that a backward pass can make the same ones again.
template <typename A>
MOMENTUM_BN_HOST_DEVICE static inline Coefficients<A> coefficients_of(const SavedStatistics<A>& saved, double weight,
                                                                      double bias) {
  const double factor = static_cast<double>(saved.rstd) * weight;
  // What the mean lost to rounding goes into the shift: y is exact also where the mean is far larger than the
  // deviation.
  const double shift = bias - static_cast<double>(saved.center_rest) * factor;
  // A weight of 0 leaves the bias, also where x - center overflows.
  return {factor == 0 ? A(0) : saved.center, static_cast<A>(factor), static_cast<A>(shift)};
}

/// What a forward pass keeps beside SavedStatistics where gradients flow through the statistics.
template <typename A>
struct SavedShares {
  A delta;           // the mean that normalises less the batch's
  A mean_share;      // of the batch in that mean, per value: m / n
  A variance_share;  // of the batch's biased variance in the variance that normalises, per value: m * c / n
};

/// @param weight  m, of the batch in the blend
/// @param n       values per channel
MOMENTUM_BN_HOST_DEVICE static inline double mean_share(double weight, double n) { return weight / n; }

MOMENTUM_BN_HOST_DEVICE static inline double variance_share(const BlendOptions& options, double weight, double n) {
  // c / n is the factor of the unbiased variance divided by n - 1.
  return weight * normalising_variance_factor(options, n) / (n - 1);
}

/// A channel's sums, which lead to dweight = gx * rstd and dbias = g.
struct GradientSums {
  double g;   // sum(g)
  double gx;  // sum(g * (x - mean)) around the mean that normalises
};

/// @param gx  sum(g * (x - center)), as kernels form it
template <typename A>
MOMENTUM_BN_HOST_DEVICE static inline GradientSums gradient_sums_of(const SavedStatistics<A>& saved, double g,
                                                                    double gx) {
  return {g, gx - static_cast<double>(saved.center_rest) * g};
}

/// dx = (g - offset) * scale + ((x - center) * deviation_scale + rest)
template <typename A>
struct InputGradientCoefficients {
  A scale;
  A offset;  // has so few digits that g - offset is hardly ever rounded
  A deviation_scale;
  A rest;  // what the offset lost, times scale
};

/// SavedShares, as exactly as they can be told from what was saved.
struct ExactShares {
  double delta;
  double mean_share;
  double variance_share;
};

/// What was saved is rounded. Where it may be the reciprocal of a whole number, as the share of a batch which
/// normalises alone is, it is taken for that, to the last bit of a double.
template <typename A>
MOMENTUM_BN_HOST_DEVICE static inline double exact_share(A share) {
  const double per_share = 1 / static_cast<double>(share);
  const double whole = std::floor(per_share + 0.5);
  constexpr double kRounding = sizeof(A) == sizeof(float) ? 0x1p-24 : 0x1p-53;
  return std::fabs(per_share - whole) <= per_share * kRounding ? 1 / whole : static_cast<double>(share);
}

template <typename A>
MOMENTUM_BN_HOST_DEVICE static inline ExactShares exact_shares(const SavedShares<A>& saved) {
  const double mean_share = exact_share(saved.mean_share);
  const double variance_share =
      saved.variance_share == saved.mean_share ? mean_share : exact_share(saved.variance_share);
  return {static_cast<double>(saved.delta), mean_share, variance_share};
}

/// Forms the coefficients for a gradient through the statistics, from the derivative
///     dx = weight * rstd * (g - mean_share * sum_g - variance_share * (x - batch mean) * sum_gx * rstd^2).
template <typename A>
MOMENTUM_BN_HOST_DEVICE static inline InputGradientCoefficients<A> input_gradient_coefficients(
    const SavedStatistics<A>& saved, const ExactShares& shares, double weight, const GradientSums& sums) {
  const auto rstd = static_cast<double>(saved.rstd);
  const A scale = static_cast<A>(rstd * weight);
  const double per_deviation = shares.variance_share * sums.gx * rstd * rstd;
  // x - batch mean = (x - center) + (delta - center_rest)
  const double from_center = shares.delta - static_cast<double>(saved.center_rest);
  const double mean_of_g = shares.mean_share * sums.g + per_deviation * from_center;
  // Half the digits are kept.
  constexpr A kHalf = sizeof(A) == sizeof(float) ? 0x1p12 : 0x1p27;
  const auto nearest = static_cast<A>(mean_of_g);
  const A offset = rounded_to_spacing_at(std::fabs(nearest) * kHalf, nearest);
  const double rest = std::isfinite(offset) ? static_cast<double>(offset) - mean_of_g : 0;
  return {scale, offset, static_cast<A>(-per_deviation * static_cast<double>(scale)),
          static_cast<A>(rest * static_cast<double>(scale))};
}

/// Returns (cos(pi * t / T) + 1) / 2, and 0 past the end.
MOMENTUM_BN_HOST_DEVICE static inline double cosine_momentum(int64_t cur_iter, int64_t total_iters) {
  const int64_t reached = cur_iter < total_iters ? cur_iter : total_iters;
  const double progress = static_cast<double>(reached) / static_cast<double>(total_iters);
#ifdef __CUDA_ARCH__
  const double cosine = cospi(progress);
#else
  constexpr double kPi = 3.14159265358979323846;
  const double cosine = std::cos(kPi * progress);
#endif
  return (cosine + 1) * 0.5;
}

}  // namespace momentum_bn::kernels
