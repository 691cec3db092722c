#pragma once

#include "kernels/cpu/kernels.h"

#include <algorithm>
#include <cmath>

// What lies between the two reads of the values: from batch statistics to what a channel is normalised with, and to
// the state.

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// Some channels; plain loops over short arrays, for the compiler's vectors.
template <typename A>
class ChannelBlend {
  static constexpr int64_t kChannels = 64;

 public:
  /// The channels [begin, end), at most kChannels.
  ChannelBlend(const BlendArgs& args, int64_t begin, int64_t end) : args_(args), begin_(begin), count_(end - begin) {}

  static void run(const BlendArgs& args, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += kChannels) ChannelBlend(args, c, std::min(c + kChannels, end)).run();
  }

 private:
  void run() {
    const double* __restrict m2 = args_.m2 + begin_;
    const double per_m2 = 1 / (args_.values_per_channel - 1);
    for (int64_t c = 0; c < count_; ++c) {
      mean_[c] = args_.mean[begin_ + c];
      var_[c] = m2[c] * per_m2;
    }
    write(args_.batch_mean, mean_);
    write(args_.batch_var, var_);
    blend();
    update_state();
    coefficients();
  }

  /// Mean and variance to normalise with.
  void blend() {
    const double m = args_.momentum;
    for (int64_t c = 0; c < count_; ++c) {
      norm_mean_[c] = mean_[c];
      norm_var_[c] = var_[c] * args_.normalising_factor;
    }
    if (!args_.running_mean) return;
    const A* __restrict running_mean = at<const A>(args_.running_mean);
    const A* __restrict running_var = at<const A>(args_.running_var);
    for (int64_t c = 0; c < count_; ++c) {
      norm_mean_[c] = m * norm_mean_[c] + (1 - m) * static_cast<double>(running_mean[c]);
      norm_var_[c] = m * norm_var_[c] + (1 - m) * static_cast<double>(running_var[c]);
    }
  }

  void update_state() {
    if (!args_.view_mean_sum) return;
    A* __restrict mean_sum = at<A>(args_.view_mean_sum);
    A* __restrict var_sum = at<A>(args_.view_var_sum);
    for (int64_t c = 0; c < count_; ++c) {
      mean_[c] += static_cast<double>(mean_sum[c]);
      var_[c] += static_cast<double>(var_sum[c]);
    }
    if (!args_.completes_update) {
      write(args_.view_mean_sum, mean_);
      write(args_.view_var_sum, var_);
      return;
    }
    const double m = args_.momentum;
    const double per_view = 1 / args_.views;
    A* __restrict running_mean = at<A>(args_.running_mean);
    A* __restrict running_var = at<A>(args_.running_var);
    for (int64_t c = 0; c < count_; ++c) {
      const double of_mean = mean_[c] * per_view;
      const double of_var = var_[c] * per_view * args_.running_factor;
      running_mean[c] = static_cast<A>(m * of_mean + (1 - m) * static_cast<double>(running_mean[c]));
      running_var[c] = static_cast<A>(m * of_var + (1 - m) * static_cast<double>(running_var[c]));
      mean_sum[c] = 0;
      var_sum[c] = 0;
    }
  }

  void coefficients() {
    double factor[kChannels];
    double rest[kChannels];
    double bias[kChannels];
    A* __restrict center = at<A>(args_.center);
    A* __restrict scale = at<A>(args_.scale);
    A* __restrict shift = at<A>(args_.shift);
    A* __restrict saved_mean = at<A>(args_.saved);
    A* __restrict saved_rest = saved_mean + args_.channels;
    A* __restrict saved_rstd = saved_rest + args_.channels;
    for (int64_t c = 0; c < count_; ++c) {
      const double rstd = 1 / std::sqrt(norm_var_[c] + args_.eps);
      saved_rstd[c] = static_cast<A>(rstd);
      factor[c] = rstd;
      bias[c] = 0;
    }
    if (args_.weight) {
      const A* __restrict weight = at<const A>(args_.weight);
      for (int64_t c = 0; c < count_; ++c) factor[c] *= static_cast<double>(weight[c]);
    }
    if (args_.bias) {
      const A* __restrict given = at<const A>(args_.bias);
      for (int64_t c = 0; c < count_; ++c) bias[c] = static_cast<double>(given[c]);
    }
    for (int64_t c = 0; c < count_; ++c) {
      // What the mean loses to rounding goes into the shift: exact also where it is far larger than the deviation.
      const A rounded = static_cast<A>(norm_mean_[c]);
      rest[c] = std::isfinite(rounded) ? norm_mean_[c] - static_cast<double>(rounded) : 0;
      center[c] = rounded;
      saved_mean[c] = rounded;
    }
    for (int64_t c = 0; c < count_; ++c) {
      scale[c] = static_cast<A>(factor[c]);
      // A weight of 0 leaves the bias, also where x - center overflows.
      center[c] = factor[c] == 0 ? 0 : center[c];
      shift[c] = static_cast<A>(bias[c] - rest[c] * factor[c]);
      saved_rest[c] = static_cast<A>(rest[c]);
    }
  }

  template <typename V>
  V* at(const void* of_channels) const {
    return static_cast<V*>(const_cast<void*>(of_channels)) + begin_;
  }

  void write(void* of_channels, const double* values) const {
    if (!of_channels) return;
    A* __restrict to = at<A>(of_channels);
    for (int64_t c = 0; c < count_; ++c) to[c] = static_cast<A>(values[c]);
  }

  const BlendArgs& args_;
  int64_t begin_;
  int64_t count_;
  // Of the batch, later with what the views before it left; and what to normalise with.
  double mean_[kChannels];
  double var_[kChannels];
  double norm_mean_[kChannels];
  double norm_var_[kChannels];
};

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
