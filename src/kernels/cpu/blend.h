#pragma once

#include "kernels/channel_rules.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/simd/parallel.h"

#include <algorithm>
#include <cmath>

// This file holds what happens between the two reads of the values: batch statistics lead to what a channel is
// normalised with, and to the new state.

namespace momentum_bn::kernels::CPU_CAPABILITY {

/// The arrays of channels that a layer has.
template <typename A>
struct Channels {
  int64_t count;
  const A* saved;   // [rows][count]
  const A* weight;  // or null
  const A* bias;    // or null

  template <typename Args>
  explicit Channels(const Args& args)
      : count(args.shape.channels),
        saved(static_cast<const A*>(args.saved)),
        weight(static_cast<const A*>(args.weight)),
        bias(static_cast<const A*>(args.bias)) {}

  SavedStatistics<A> statistics(int64_t c) const { return {saved[c], saved[count + c], saved[2 * count + c]}; }
  SavedShares<A> shares(int64_t c) const { return {saved[3 * count + c], saved[4 * count + c], saved[5 * count + c]}; }
  double weight_of(int64_t c) const { return weight ? static_cast<double>(weight[c]) : 1; }
  double bias_of(int64_t c) const { return bias ? static_cast<double>(bias[c]) : 0; }

  Coefficients<A> coefficients(int64_t c) const { return coefficients_of(statistics(c), weight_of(c), bias_of(c)); }
};

/// Blends some channels. These are plain loops over short arrays, which compilers turn into vector instructions.
template <typename A>
class ChannelBlend {
  static constexpr int64_t kChannels = 64;

 public:
  /// Blends the channels [begin, end).
  /// @param mean, m2  arrays [channels]
  static void run(const ForwardArgs& args, const double* mean, const double* m2, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += kChannels) {
      ChannelBlend(args, c, std::min(kChannels, end - c)).run(mean + c, m2 + c);
    }
  }

 private:
  ChannelBlend(const ForwardArgs& args, int64_t begin, int64_t count)
      : args_(args), blend_(*args.blend), begin_(begin), count_(count) {}

  void run(const double* __restrict mean, const double* __restrict m2) {
    const double per_m2 = 1 / (blend_.values_per_channel - 1);
    for (int64_t c = 0; c < count_; ++c) {
      mean_[c] = mean[c];
      var_[c] = m2[c] * per_m2;
    }
    write(blend_.batch_mean, mean_);
    write(blend_.batch_var, var_);
    blend();
    save();
    update_state();
  }

  /// Forms the mean and the variance to normalise with.
  void blend() {
    const double factor = normalising_variance_factor(blend_.options, blend_.values_per_channel);
    for (int64_t c = 0; c < count_; ++c) {
      norm_mean_[c] = mean_[c];
      norm_var_[c] = var_[c] * factor;
    }
    const double m = blend_.batch_weight;
    if (!blend_.running_mean || m == 1) {
      return;
    }
    const A* __restrict running_mean = at<const A>(blend_.running_mean);
    const A* __restrict running_var = at<const A>(blend_.running_var);
    for (int64_t c = 0; c < count_; ++c) {
      norm_mean_[c] = blended(m, norm_mean_[c], static_cast<double>(running_mean[c]));
      norm_var_[c] = blended(m, norm_var_[c], static_cast<double>(running_var[c]));
    }
  }

  void save() const {
    A* __restrict center = at<A>(args_.saved);
    A* __restrict rest = center + args_.shape.channels;
    A* __restrict rstd = rest + args_.shape.channels;
    for (int64_t c = 0; c < count_; ++c) {
      const auto saved = saved_statistics<A>(blend_.options, norm_mean_[c], norm_var_[c]);
      center[c] = saved.center;
      rest[c] = saved.center_rest;
      rstd[c] = saved.rstd;
    }
    if (args_.saved_rows != kSavedRowsThroughStatistics) {
      return;
    }
    A* __restrict delta = rstd + args_.shape.channels;
    A* __restrict share_of_mean = delta + args_.shape.channels;
    A* __restrict share_of_variance = share_of_mean + args_.shape.channels;
    const double n = blend_.values_per_channel;
    const double m = blend_.running_mean ? blend_.batch_weight : 1;
    const A of_mean = static_cast<A>(mean_share(m, n));
    const A of_variance = static_cast<A>(variance_share(blend_.options, m, n));
    for (int64_t c = 0; c < count_; ++c) {
      delta[c] = static_cast<A>(norm_mean_[c] - mean_[c]);
      share_of_mean[c] = of_mean;
      share_of_variance[c] = of_variance;
    }
  }

  void update_state() {
    if (blend_.view_mean_sum) {
      take_view();
    }
    if (blend_.running_mean && blend_.completes_update) {
      update_running();
    }
  }

  /// Turns mean and variance into those of all views so far.
  void take_view() {
    A* __restrict mean_sum = at<A>(blend_.view_mean_sum);
    A* __restrict var_sum = at<A>(blend_.view_var_sum);
    for (int64_t c = 0; c < count_; ++c) {
      mean_[c] += static_cast<double>(mean_sum[c]);
      var_[c] += static_cast<double>(var_sum[c]);
    }
    if (!blend_.completes_update) {
      write(blend_.view_mean_sum, mean_);
      write(blend_.view_var_sum, var_);
      return;
    }
    const double per_view = 1 / blend_.views;
    for (int64_t c = 0; c < count_; ++c) {
      mean_[c] *= per_view;
      var_[c] *= per_view;
      mean_sum[c] = 0;
      var_sum[c] = 0;
    }
  }

  void update_running() {
    const double m = blend_.update_weight;
    const double factor = running_variance_factor(blend_.options, blend_.values_per_channel);
    A* __restrict running_mean = at<A>(blend_.running_mean);
    A* __restrict running_var = at<A>(blend_.running_var);
    for (int64_t c = 0; c < count_; ++c) {
      running_mean[c] = static_cast<A>(blended(m, mean_[c], static_cast<double>(running_mean[c])));
      running_var[c] = static_cast<A>(blended(m, var_[c] * factor, static_cast<double>(running_var[c])));
    }
  }

  template <typename V>
  V* at(void* of_channels) const {
    return static_cast<V*>(of_channels) + begin_;
  }

  void write(void* of_channels, const double* values) const {
    if (!of_channels) {
      return;
    }
    A* __restrict to = at<A>(of_channels);
    for (int64_t c = 0; c < count_; ++c) {
      to[c] = static_cast<A>(values[c]);
    }
  }

  const ForwardArgs& args_;
  const BlendArgs& blend_;
  int64_t begin_;
  int64_t count_;
  // The first two are the batch's and later those of all views; the others normalise.
  double mean_[kChannels];
  double var_[kChannels];
  double norm_mean_[kChannels];
  double norm_var_[kChannels];
};

/// The arrays that the statistics of channels go to, and what follows.
template <typename A>
struct MomentsSink {
  // [channels]
  double* mean;
  double* m2;
  /// Where this is not null, channels are blended as soon as their statistics are there.
  const ForwardArgs* forward;

  /// Must be called exactly once for each channel, when its mean and m2 are written; several threads may call it at
  /// once.
  void finish(int64_t channel_begin, int64_t channel_end) const {
    if (forward) {
      ChannelBlend<A>::run(*forward, mean, m2, channel_begin, channel_end);
    }
  }
};

/// Writes the coefficients of the channels [begin, end) into arrays of as many.
template <typename A>
void coefficients_of_channels(const Channels<A>& channels, int64_t begin, int64_t end, A* __restrict center,
                              A* __restrict scale, A* __restrict shift) {
  with_flags(channels.weight != nullptr, channels.bias != nullptr, [&](auto has_weight, auto has_bias) {
    for (int64_t c = begin; c < end; ++c) {
      const double weight = has_weight() ? static_cast<double>(channels.weight[c]) : 1;
      const double bias = has_bias() ? static_cast<double>(channels.bias[c]) : 0;
      const auto of_channel = coefficients_of(channels.statistics(c), weight, bias);
      center[c - begin] = of_channel.center;
      scale[c - begin] = of_channel.scale;
      shift[c - begin] = of_channel.shift;
    }
  });
}

}  // namespace momentum_bn::kernels::CPU_CAPABILITY
