#pragma once

#include "ops/shared/checks.h"

#include <momentum_bn/options.h>

#include <optional>
#include <string_view>

namespace momentum_bn {

/// What the operators are told of a layer's configuration.
struct Config {
  double eps;
  std::optional<double> momentum;  // of BatchNorm's update; nullopt: cumulative average
  int64_t total_iters;
  int64_t views_per_update;
  Schedule schedule;
  Variance variance;
  bool detach_statistics;
  Activation activation;
};

/// @throws c10::ValueError on a word that is none of the enumerators'
Schedule schedule_of(std::string_view word);
Variance variance_of(std::string_view word);
Activation activation_of(std::optional<std::string_view> word);

/// @param train  the arguments of a training forward
/// @throws c10::ValueError on a value that a layer's constructor would refuse
template <typename Train>
Config checked_config(const Train& train) {
  check_eps(train.eps);
  check_momentum(train.momentum);
  check_total_iters(train.total_iters);
  check_views_per_update(train.views_per_update);
  return {train.eps,
          train.momentum,
          train.total_iters,
          train.views_per_update,
          schedule_of(train.schedule),
          variance_of(train.variance),
          train.detach_statistics,
          activation_of(train.activation)};
}

}  // namespace momentum_bn
