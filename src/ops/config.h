#pragma once

#include "kernels/channel_rules.h"

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

using kernels::normalising_variance_factor;
using kernels::running_variance_factor;

}  // namespace momentum_bn
