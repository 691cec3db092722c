#pragma once

namespace momentum_bn {

/// Which variance of the batch enters the blend and the running variance.
/// b_var is the unbiased batch variance, n the number of values per channel.
enum class Variance {
  Published,  ///< b_var * n / (n - 1) in both, as `zengarden/momentum2-teacher` computes it
  Unbiased,   ///< b_var in both
  Biased,     ///< b_var * (n - 1) / n normalises, b_var enters the running variance, as torch's BatchNorm
};

}  // namespace momentum_bn
