#pragma once

#include "kernels/cuda/device.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/moments.h"

// From a channel's batch statistics to what it is normalised with, and to the state.

namespace momentum_bn::kernels::cuda {

/// y = (x - center) * scale + shift
template <typename A>
struct Coefficients {
  A center;
  A scale;
  A shift;
};

/// (cos(pi * t / T) + 1) / 2
__device__ inline double cosine_momentum(int64_t cur_iter, int64_t total_iters) {
  const int64_t reached = cur_iter < total_iters ? cur_iter : total_iters;
  return (cospi(static_cast<double>(reached) / static_cast<double>(total_iters)) + 1) * 0.5;
}

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
    const double n = batch.count;
    const int variance = args.blend.variance;
    norm_mean_ = mean_;
    norm_var_ = variance == 1 ? var_ : variance == 0 ? var_ * (n / (n - 1)) : batch.m2 / n;
    running_factor_ = variance == 0 ? n / (n - 1) : 1;
    if (!args.tracks) return;
    momentum_ = args.batch_mean ? args.fixed_momentum : momentum_now(args.state);
    running_mean_ = channel_value<A>(args.state.running_mean, channel);
    running_var_ = channel_value<A>(args.state.running_var, channel);
    norm_mean_ = blended(norm_mean_, running_mean_);
    norm_var_ = blended(norm_var_, running_var_);
  }

  __device__ Coefficients<A> coefficients() const {
    const double factor = args_.weight ? rstd() * channel_value<A>(args_.weight, channel_) : rstd();
    const double bias = args_.bias ? channel_value<A>(args_.bias, channel_) : 0;
    // What the mean loses to rounding goes into the shift: exact also where it is far larger than the deviation.
    const A center = static_cast<A>(norm_mean_);
    // A weight of 0 leaves the bias, also where x - center overflows.
    return {factor == 0 ? 0 : center, static_cast<A>(factor), static_cast<A>(bias - rest(center) * factor)};
  }

  /// Writes `saved`.
  __device__ void save() const {
    const A center = static_cast<A>(norm_mean_);
    A* saved = static_cast<A*>(args_.saved);
    const int64_t channels = args_.shape.channels;
    saved[channel_] = center;
    saved[channels + channel_] = static_cast<A>(rest(center));
    saved[2 * channels + channel_] = static_cast<A>(rstd());
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
  __device__ double rstd() const { return 1 / sqrt(norm_var_ + args_.blend.eps); }
  __device__ double rest(A center) const { return isfinite(center) ? norm_mean_ - static_cast<double>(center) : 0; }

  __device__ static double momentum_now(const State& state) {
    const double momentum = StoredMomentum{state.momentum, state.momentum_is_float}.get();
    return momentum >= 0 ? momentum : 1 / static_cast<double>(*state.cur_iter + 1);
  }

  __device__ double blended(double batch, double running) const {
    return momentum_ * batch + (1 - momentum_) * running;
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
    set(state.running_mean, blended(mean_sum * per_view, running_mean_));
    set(state.running_var, blended(var_sum * per_view * running_factor_, running_var_));
  }

  __device__ void set(void* values, double value) const { static_cast<A*>(values)[channel_] = static_cast<A>(value); }

  const ForwardArgs& args_;
  int64_t channel_;
  double mean_;
  double var_;  // unbiased
  double norm_mean_;
  double norm_var_;
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
