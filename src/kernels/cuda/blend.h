#pragma once

#include "kernels/channel_rules.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/moments.h"

// This file leads from a channel's batch statistics to what it is normalised with, and to the state.

namespace momentum_bn::kernels::cuda {

/// A momentum in device memory.
struct StoredMomentum {
  void* memory;
  bool is_float;

  __device__ double get() const {
    return is_float ? static_cast<double>(*static_cast<const float*>(memory)) : *static_cast<const double*>(memory);
  }
  __device__ void set(double value) const {
    if (is_float) {
      *static_cast<float*>(memory) = static_cast<float>(value);
    } else {
      *static_cast<double*>(memory) = value;
    }
  }
  __device__ void advance(int64_t* cur_iter, int64_t total_iters, bool cosine) const {
    const int64_t next = ++*cur_iter;
    if (cosine && get() >= 0) {
      set(cosine_momentum(next, total_iters));
    }
  }
};

/// The blend of one channel. Its constructor reads everything, and update() alone writes the state.
template <typename A>
class ChannelBlend {
 public:
  __device__ ChannelBlend(const ForwardArgs& args, int64_t channel, const BatchMoments& batch)
      : args_(args), channel_(channel), count_(batch.count), mean_(batch.mean), var_(batch.m2 / (batch.count - 1)) {
    norm_mean_ = mean_;
    double norm_var = var_ * normalising_variance_factor(args.options, count_);
    if (args.tracks) {
      read_weights();
      running_mean_ = channel_value<A>(args.state.running_mean, channel);
      running_var_ = channel_value<A>(args.state.running_var, channel);
      // A batch of weight 1 normalises alone, whatever the running statistics hold.
      if (batch_weight_ != 1) {
        norm_mean_ = blended(batch_weight_, norm_mean_, running_mean_);
        norm_var = blended(batch_weight_, norm_var, running_var_);
      }
    }
    saved_ = saved_statistics<A>(args.options, norm_mean_, norm_var);
  }

  /// Asks the cache for what the constructor and coefficients() read.
  __device__ static void prefetch_inputs(const ForwardArgs& args, int64_t channel) {
    const auto prefetch_of = [&](const void* values) {
      if (values) {
        prefetch(static_cast<const A*>(values) + channel);
      }
    };
    prefetch_of(args.weight);
    prefetch_of(args.bias);
    if (!args.tracks) {
      return;
    }
    prefetch_of(args.state.running_mean);
    prefetch_of(args.state.running_var);
    prefetch(args.state.momentum);
  }

  __device__ Coefficients<A> coefficients() const {
    const double weight = args_.weight ? channel_value<A>(args_.weight, channel_) : 1;
    const double bias = args_.bias ? channel_value<A>(args_.bias, channel_) : 0;
    return coefficients_of(saved_, weight, bias);
  }

  /// Writes `saved`.
  __device__ void save() const {
    save_row(0, saved_.center);
    save_row(1, saved_.center_rest);
    save_row(2, saved_.rstd);
    if (!args_.through_statistics) {
      return;
    }
    save_row(3, static_cast<A>(norm_mean_ - mean_));
    save_row(4, static_cast<A>(mean_share(batch_weight_, count_)));
    save_row(5, static_cast<A>(variance_share(args_.options, batch_weight_, count_)));
  }

  /// Takes the batch into the state, or writes it where the caller wants it.
  __device__ void update() const {
    if (args_.batch_mean) {
      set(args_.batch_mean, mean_);
      set(args_.batch_var, var_);
    } else if (args_.tracks) {
      update_state();
    }
  }

 private:
  __device__ void read_weights() {
    const State& state = args_.state;
    if (args_.batch_mean) {
      batch_weight_ = args_.momentum;
    } else if (state.momentum) {
      const double momentum = StoredMomentum{state.momentum, state.momentum_is_float}.get();
      batch_weight_ = update_weight_ = momentum >= 0 ? momentum : next_average(*state.cur_iter);
    } else {
      update_weight_ = args_.momentum >= 0 ? args_.momentum : next_average(*state.num_batches_tracked);
    }
  }

  /// The weight of what is next in a cumulative average.
  __device__ static double next_average(int64_t so_far) { return 1 / static_cast<double>(so_far + 1); }

  __device__ void update_state() const {
    const State& state = args_.state;
    if (!state.momentum) {
      return update_running(mean_, var_);
    }
    const double mean_sum = channel_value<A>(state.view_mean_sum, channel_) + mean_;
    const double var_sum = channel_value<A>(state.view_var_sum, channel_) + var_;
    const int64_t views = *state.view_count + 1;
    const bool complete = views >= args_.options.views_per_update;
    set(state.view_mean_sum, complete ? 0 : mean_sum);
    set(state.view_var_sum, complete ? 0 : var_sum);
    if (!complete) {
      return;
    }
    const double per_view = 1 / static_cast<double>(views);
    update_running(mean_sum * per_view, var_sum * per_view);
  }

  __device__ void update_running(double mean, double var) const {
    const double factor = running_variance_factor(args_.options, count_);
    set(args_.state.running_mean, blended(update_weight_, mean, running_mean_));
    set(args_.state.running_var, blended(update_weight_, var * factor, running_var_));
  }

  __device__ void save_row(int row, A value) const {
    static_cast<A*>(args_.saved)[row * args_.shape.channels + channel_] = value;
  }
  __device__ void set(void* values, double value) const { static_cast<A*>(values)[channel_] = static_cast<A>(value); }

  const ForwardArgs& args_;
  int64_t channel_;
  double count_;  // of values
  double mean_;
  double var_;  // unbiased
  double norm_mean_;
  SavedStatistics<A> saved_;
  double batch_weight_ = 1;
  double update_weight_ = 0;
  double running_mean_ = 0;
  double running_var_ = 0;
};

/// The state's scalars, by one thread, when all channels are done.
__device__ inline void move_scalars(const ForwardArgs& args) {
  const State& state = args.state;
  ++*state.num_batches_tracked;
  if (!state.momentum) {
    return;
  }
  const int64_t views = *state.view_count + 1;
  const bool complete = views >= args.options.views_per_update;
  *state.view_count = complete ? 0 : views;
  if (!complete) {
    return;
  }
  StoredMomentum{state.momentum, state.momentum_is_float}.advance(state.cur_iter, args.options.total_iters,
                                                                  args.options.cosine);
}

/// Moves the scalars in the last to get here of `blocks`, each of which has updated its channels. By all threads.
__device__ inline void finish_state(const ForwardArgs& args, int64_t blocks) {
  if (!args.tracks || args.batch_mean) {
    return;
  }
  if (is_last_block(args.counters, static_cast<unsigned>(blocks)) && threadIdx.x == 0) {
    move_scalars(args);
  }
}

}  // namespace momentum_bn::kernels::cuda
