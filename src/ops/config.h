#pragma once

#include <momentum_bn/options.h>

#include <optional>
#include <string_view>

namespace momentum_bn {

/// What the operators are told of a layer's configuration.
struct Config {
  double eps;
  int64_t total_iters;
  int64_t views_per_update;
  Schedule schedule;
  Variance variance;
  Activation activation;
};

/// @throws c10::ValueError on a word that is none of the enumerators'
Schedule schedule_of(std::string_view word);
Variance variance_of(std::string_view word);
Activation activation_of(std::optional<std::string_view> word);

/// @throws c10::ValueError on a value that a layer's constructor would refuse
Config checked_config(double eps, int64_t total_iters, int64_t views_per_update, std::string_view schedule,
                      std::string_view variance, std::optional<std::string_view> activation);

/// What the batch variance (unbiased, over n values) is multiplied with before it normalises.
/// @tparam Count  double, or a tensor where only the device knows how many there are
template <typename Count>
Count normalising_variance_factor(Variance variance, const Count& n) {
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

/// What the mean of the views' batch variances is multiplied with before it enters the running variance.
template <typename Count>
Count running_variance_factor(Variance variance, const Count& n) {
  return variance == Variance::Published ? n / (n - 1) : n / n;
}

}  // namespace momentum_bn
