#pragma once

#include "kernels/channel_rules.h"
#include "ops/shared/operator.h"

#include <momentum_bn/options.h>

#include <optional>
#include <tuple>

// These are the options of a layer on their way from its attributes to the kernels. An option is declared and checked
// here. Those that the formulas of a channel read go on to every device in one kernels::BlendOptions.

namespace momentum_bn {

namespace ops {

/// The options of a layer that a training forward is given. Their meaning is in <momentum_bn/options.h>; words stand
/// for its enumerators.
struct Options {
  double eps;
  /// The batch's weight in the update of BatchNorm's running statistics; nullopt makes these a cumulative average. It
  /// is not read where the state holds a momentum, as Momentum BatchNorm's does.
  std::optional<double> momentum;
  int64_t total_iters;
  int64_t views_per_update;
  Word schedule;
  Word variance;
  bool detach_statistics;
  MaybeWord activation;

  /// All of them, in the order of kOptionsSchema.
  auto fields() const {
    return std::tie(eps, momentum, total_iters, views_per_update, schedule, variance, detach_statistics, activation);
  }
};

/// The same fields as the schemas of operators declare them.
constexpr char kOptionsSchema[] =
    "float eps, float? momentum, int total_iters, int views_per_update, str schedule, str variance, "
    "bool detach_statistics, str? activation";

}  // namespace ops

// Each of these checks throws c10::ValueError, which names the argument, where a value is not allowed.

/// Checks all of them: values, and words that must be among the enumerators'.
void check_options(const ops::Options& options);

void check_num_features(int64_t num_features);
void check_eps(double eps);
void check_momentum(std::optional<double> momentum);
void check_total_iters(int64_t total_iters);
void check_cur_iter(int64_t cur_iter);

/// Returns those options that the formulas of a channel read. @param options  already checked
kernels::BlendOptions blend_options_of(const ops::Options& options);

// What a word stands for. These throw c10::ValueError on a word that stands for none of the enumerators.

Schedule schedule_of(ops::Word word);
Variance variance_of(ops::Word word);
bool is_relu(const ops::MaybeWord& activation);

}  // namespace momentum_bn
