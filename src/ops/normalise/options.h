#pragma once

#include "kernels/channel_rules.h"
#include "ops/shared/operator.h"

#include <momentum_bn/options.h>

#include <optional>
#include <tuple>

// The options of a layer on their way from its attributes to the kernels: an option is declared and checked here, and
// what is one for all channels reaches every device's formulas in a BlendOptions.

namespace momentum_bn {

namespace ops {

/// What a training forward is told of a layer's options.
struct Options {
  double eps;
  /// Of BatchNorm's update; nullopt: cumulative average. Not read where the state holds a momentum.
  std::optional<double> momentum;
  int64_t total_iters;
  int64_t views_per_update;
  Word schedule;
  Word variance;
  bool detach_statistics;
  MaybeWord activation;

  auto fields() const {
    return std::tie(eps, momentum, total_iters, views_per_update, schedule, variance, detach_statistics, activation);
  }
};

/// These fields in the schemas of operators.
constexpr char kOptionsSchema[] =
    "float eps, float? momentum, int total_iters, int views_per_update, str schedule, str variance, "
    "bool detach_statistics, str? activation";

}  // namespace ops

/// Throws c10::ValueError on a value that is not allowed or a word that is none of the enumerators'.
void check_options(const ops::Options& options);

void check_num_features(int64_t num_features);
void check_eps(double eps);
void check_momentum(std::optional<double> momentum);
void check_total_iters(int64_t total_iters);
void check_cur_iter(int64_t cur_iter);

/// What the formulas of a channel are told. @param options  checked
kernels::BlendOptions blend_options_of(const ops::Options& options);

/// @throws c10::ValueError on a word that is none of the enumerators'
Schedule schedule_of(ops::Word word);
Variance variance_of(ops::Word word);
bool is_relu(const ops::MaybeWord& activation);

}  // namespace momentum_bn
