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
inline double normalising_variance_factor(Variance variance, double n) {
  switch (variance) {
    case Variance::Published:
      return n / (n - 1);
    case Variance::Unbiased:
      return 1;
    case Variance::Biased:
      return (n - 1) / n;
  }
  return 1;
}

/// What the mean of the views' batch variances is multiplied with before it enters the running variance.
inline double running_variance_factor(Variance variance, double n) {
  return variance == Variance::Published ? n / (n - 1) : 1;
}

}  // namespace momentum_bn
