#include "ops/cpu/blend.h"

#include <momentum_bn/schedule.h>

namespace momentum_bn::cpu {
namespace {

double read_momentum(const at::Tensor& momentum) {
  return momentum.scalar_type() == at::kDouble ? *momentum.const_data_ptr<double>()
                                               : static_cast<double>(*momentum.const_data_ptr<float>());
}

void write_momentum(const at::Tensor& momentum, double value) {
  if (momentum.scalar_type() == at::kDouble) {
    *momentum.mutable_data_ptr<double>() = value;
  } else {
    *momentum.mutable_data_ptr<float>() = static_cast<float>(value);
  }
}

/// Returns the weight of the batch now.
double current_momentum(const State& state) {
  const double momentum = read_momentum(state.momentum);
  return momentum >= 0 ? momentum : 1.0 / static_cast<double>(*state.cur_iter.const_data_ptr<int64_t>() + 1);
}

}  // namespace

void advance_schedule(at::Tensor& cur_iter, at::Tensor& momentum, int64_t total_iters, Schedule schedule) {
  const int64_t next = ++*cur_iter.mutable_data_ptr<int64_t>();
  if (schedule == Schedule::Cosine && read_momentum(momentum) >= 0) {
    write_momentum(momentum, scheduled_momentum(next, total_iters));
  }
}

StateBlend::StateBlend(double values_per_channel, at::ScalarType accumulate, State& state, const Config& config)
    : state_(state), config_(config) {
  args_.values_per_channel = values_per_channel;
  args_.eps = config.eps;
  args_.variance = config.variance;
  args_.batch_weight = 1;
  if (!state.tracks()) {
    return;
  }
  running_mean_ = ChannelArray(state.running_mean, accumulate);
  running_var_ = ChannelArray(state.running_var, accumulate);
  view_mean_sum_ = ChannelArray(state.view_mean_sum, accumulate);
  view_var_sum_ = ChannelArray(state.view_var_sum, accumulate);
  const int64_t views = *state.view_count.const_data_ptr<int64_t>() + 1;
  args_.batch_weight = current_momentum(state);
  args_.update_weight = args_.batch_weight;
  args_.views = static_cast<double>(views);
  args_.completes_update = views >= config.views_per_update;
  args_.running_mean = running_mean_.data();
  args_.running_var = running_var_.data();
  args_.view_mean_sum = view_mean_sum_.data();
  args_.view_var_sum = view_var_sum_.data();
}

void StateBlend::finish() {
  if (!state_.tracks()) {
    return;
  }
  for (const auto* array : {&running_mean_, &running_var_, &view_mean_sum_, &view_var_sum_}) {
    array->write_back();
  }
  ++*state_.num_batches_tracked.mutable_data_ptr<int64_t>();
  *state_.view_count.mutable_data_ptr<int64_t>() = args_.completes_update ? 0 : static_cast<int64_t>(args_.views);
  if (args_.completes_update) {
    advance_schedule(state_.cur_iter, state_.momentum, config_.total_iters, config_.schedule);
  }
}

FunctionalBlend::FunctionalBlend(double values_per_channel, const ops::MaybeTensor& running_mean,
                                 const ops::MaybeTensor& running_var, const FunctionalOptions& options,
                                 const at::Tensor& b_mean, const at::Tensor& b_var)
    : running_mean_(running_mean, b_mean.scalar_type()), running_var_(running_var, b_mean.scalar_type()) {
  args_.values_per_channel = values_per_channel;
  args_.eps = options.eps;
  args_.variance = options.variance;
  args_.batch_weight = options.momentum;
  args_.running_mean = running_mean_.data();
  args_.running_var = running_var_.data();
  args_.batch_mean = b_mean.data_ptr();
  args_.batch_var = b_var.data_ptr();
}

}  // namespace momentum_bn::cpu
