#pragma once

#include "kernels/channel_rules.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/moments.h"

// From a channel's batch statistics to what it is normalised with, and to the state.

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
    if (cosine && get() >= 0) set(cosine_momentum(next, total_iters));
  }
};

/// One channel. Everything is read by its constructor, and the state written by update() alone.
template <typename A>
class ChannelBlend {
 public:
  __device__ ChannelBlend(const ForwardArgs& args, int64_t channel, const BatchMoments& batch)
      : args_(args), channel_(channel), mean_(batch.mean), var_(batch.m2 / (batch.count - 1)) {
    double norm_mean = mean_;
    double norm_var = var_ * normalising_variance_factor(args.blend.variance, batch.count);
    running_factor_ = running_variance_factor(args.blend.variance, batch.count);
    if (args.tracks) {
      momentum_ = args.batch_mean ? args.fixed_momentum : momentum_now(args.state);
      running_mean_ = channel_value<A>(args.state.running_mean, channel);
      running_var_ = channel_value<A>(args.state.running_var, channel);
      // A batch of weight 1 normalises alone, whatever the running statistics hold.
      if (momentum_ != 1) {
        norm_mean = blended(momentum_, norm_mean, running_mean_);
        norm_var = blended(momentum_, norm_var, running_var_);
      }
    }
    saved_ = saved_statistics<A>(norm_mean, norm_var, args.blend.eps);
  }

  __device__ Coefficients<A> coefficients() const {
    const double weight = args_.weight ? channel_value<A>(args_.weight, channel_) : 1;
    const double bias = args_.bias ? channel_value<A>(args_.bias, channel_) : 0;
    return coefficients_of(saved_, weight, bias);
  }

  /// Writes `saved`.
  __device__ void save() const {
    A* saved = static_cast<A*>(args_.saved);
    const int64_t channels = args_.shape.channels;
    saved[channel_] = saved_.center;
    saved[channels + channel_] = saved_.center_rest;
    saved[2 * channels + channel_] = saved_.rstd;
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
  __device__ static double momentum_now(const State& state) {
    const double momentum = StoredMomentum{state.momentum, state.momentum_is_float}.get();
    return momentum >= 0 ? momentum : 1 / static_cast<double>(*state.cur_iter + 1);
  }

  __device__ void update_state() const {
    const State& state = args_.state;
    const double mean_sum = channel_value<A>(state.view_mean_sum, channel_) + mean_;
    const double var_sum = channel_value<A>(state.view_var_sum, channel_) + var_;
    const int64_t views = *state.view_count + 1;
    const bool complete = views >= args_.blend.views_per_update;
    set(state.view_mean_sum, complete ? 0 : mean_sum);
    set(state.view_var_sum, complete ? 0 : var_sum);
    if (!complete) return;
    const double per_view = 1 / static_cast<double>(views);
    set(state.running_mean, blended(momentum_, mean_sum * per_view, running_mean_));
    set(state.running_var, blended(momentum_, var_sum * per_view * running_factor_, running_var_));
  }

  __device__ void set(void* values, double value) const { static_cast<A*>(values)[channel_] = static_cast<A>(value); }

  const ForwardArgs& args_;
  int64_t channel_;
  double mean_;
  double var_;  // unbiased
  SavedStatistics<A> saved_;
  double running_factor_;
  double momentum_ = 1;
  double running_mean_ = 0;
  double running_var_ = 0;
};

/// The state's scalars, by one thread, when all channels are done.
__device__ inline void move_scalars(const ForwardArgs& args) {
  const State& state = args.state;
  ++*state.num_batches_tracked;
  const int64_t views = *state.view_count + 1;
  const bool complete = views >= args.blend.views_per_update;
  *state.view_count = complete ? 0 : views;
  if (!complete) return;
  StoredMomentum{state.momentum, state.momentum_is_float}.advance(state.cur_iter, args.blend.total_iters,
                                                                  args.blend.cosine);
}

/// Moves the scalars in the last to get here of `blocks`, each of which has updated its channels. By all threads.
__device__ inline void finish_state(const ForwardArgs& args, int64_t blocks) {
  if (!args.tracks || args.batch_mean) return;
  if (is_last_block(args.counters, static_cast<unsigned>(blocks)) && threadIdx.x == 0) move_scalars(args);
}

}  // namespace momentum_bn::kernels::cuda
