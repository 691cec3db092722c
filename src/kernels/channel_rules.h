#pragma once

#include <momentum_bn/variance.h>

#include <cmath>
#include <cstdint>

// This file holds what the layers compute for each channel, once for the host and for devices. The functions are
// static, so that every source has a copy of its own: the CPU kernels are compiled once per instruction set, and no
// copy may stand in for another.

#ifdef __CUDACC__
#define MOMENTUM_BN_HOST_DEVICE __host__ __device__
#else
#define MOMENTUM_BN_HOST_DEVICE
#endif

namespace momentum_bn::kernels {

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
MOMENTUM_BN_HOST_DEVICE static inline Count normalising_variance_factor(Variance variance, const Count& n) {
  switch (variance) {
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
MOMENTUM_BN_HOST_DEVICE static inline Count running_variance_factor(Variance variance, const Count& n) {
  return variance == Variance::Published ? n / (n - 1) : n / n;
}

/// Blends the batch, which has this weight, with the running statistics: into what normalises, and what an update
/// leaves.
MOMENTUM_BN_HOST_DEVICE static inline double blended(double weight, double batch, double running) {
  return weight * batch + (1 - weight) * running;
}

/// What a forward pass keeps of the statistics that a channel is normalised with. A is what values are computed in.
template <typename A>
struct SavedStatistics {
  A center;       // the mean, rounded
  A center_rest;  // what it lost to rounding
  A rstd;         // 1 / sqrt(variance + eps)
};

template <typename A>
MOMENTUM_BN_HOST_DEVICE static inline SavedStatistics<A> saved_statistics(double mean, double variance, double eps) {
  const A center = static_cast<A>(mean);
  // An infinite center has lost nothing: infinity less infinity is not a number.
  const double rest = std::isfinite(center) ? mean - static_cast<double>(center) : 0;
  return {center, static_cast<A>(rest), static_cast<A>(1 / std::sqrt(variance + eps))};
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

MOMENTUM_BN_HOST_DEVICE static inline double variance_share(Variance variance, double weight, double n) {
  // c / n is the factor of the unbiased variance divided by n - 1.
  return weight * normalising_variance_factor(variance, n) / (n - 1);
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

/// dx = (g - offset - (x - center) * slope) * scale
template <typename A>
struct InputGradientCoefficients {
  A scale;
  A slope;
  A offset;
};

/// Forms them for a gradient through the statistics, from the derivative
///     dx = weight * rstd * (g - mean_share * sum_g - variance_share * (x - batch mean) * sum_gx * rstd^2).
template <typename A>
MOMENTUM_BN_HOST_DEVICE static inline InputGradientCoefficients<A> input_gradient_coefficients(
    const SavedStatistics<A>& saved, const SavedShares<A>& shares, double weight, const GradientSums& sums) {
  const auto rstd = static_cast<double>(saved.rstd);
  const double slope = static_cast<double>(shares.variance_share) * sums.gx * rstd * rstd;
  // x - batch mean = (x - center) + (delta - center_rest)
  const double from_center = static_cast<double>(shares.delta) - static_cast<double>(saved.center_rest);
  const double offset = static_cast<double>(shares.mean_share) * sums.g + slope * from_center;
  return {static_cast<A>(rstd * weight), static_cast<A>(slope), static_cast<A>(offset)};
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
