#include "ops/cpu/blend.h"

#include "kernels/cpu/dispatch.h"

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

/// The weight of the batch now.
double current_momentum(const State& state) {
  const double momentum = read_momentum(state.momentum);
  return momentum >= 0 ? momentum : 1.0 / static_cast<double>(*state.cur_iter.const_data_ptr<int64_t>() + 1);
}

/// What each coefficient's array takes, in doubles.
int64_t pitch(int64_t channels) { return channels + kernels::kPadding; }

}  // namespace

void advance_schedule(at::Tensor& cur_iter, at::Tensor& momentum, int64_t total_iters, Schedule schedule) {
  const int64_t next = ++*cur_iter.mutable_data_ptr<int64_t>();
  if (schedule == Schedule::Cosine && read_momentum(momentum) >= 0) {
    write_momentum(momentum, scheduled_momentum(next, total_iters));
  }
}

Doubles::Memory& Doubles::kept() {
  static thread_local Memory memory;
  return memory;
}

Doubles::Doubles(int64_t size) : memory_(std::move(kept().doubles)), size_(kept().size) {
  kept().size = 0;
  if (size_ >= size) return;
  memory_.reset(new double[static_cast<size_t>(size)]);
  size_ = size;
}

Doubles::~Doubles() {
  if (size_ > kKept) return;
  kept().doubles = std::move(memory_);
  kept().size = size_;
}

ChannelBlend::ChannelBlend(const at::Tensor& x, double values_per_channel, const ops::MaybeTensor& weight,
                           const ops::MaybeTensor& bias, const at::Tensor& saved, double eps, Variance variance)
    : accumulate_(saved.scalar_type()),
      weight_(weight, accumulate_),
      bias_(bias, accumulate_),
      numbers_(2 * x.size(1) + 3 * pitch(x.size(1))) {
  args_.type = kernel_type(accumulate_);
  args_.channels = x.size(1);
  args_.values_per_channel = values_per_channel;
  args_.eps = eps;
  args_.momentum = 1;
  args_.normalising_factor = normalising_variance_factor(variance, args_.values_per_channel);
  args_.weight = weight_.data();
  args_.bias = bias_.data();
  args_.saved = saved.mutable_data_ptr();
}

void ChannelBlend::attach(kernels::ForwardArgs& args) {
  const int64_t channels = args_.channels;
  args.mean = numbers_.get();
  args.m2 = args.mean + channels;
  args.center = args.m2 + channels;
  args.scale = args.m2 + channels + pitch(channels);
  args.shift = args.m2 + channels + 2 * pitch(channels);
  args_.mean = args.mean;
  args_.m2 = args.m2;
  args_.center = args.center;
  args_.scale = args.scale;
  args_.shift = args.shift;
  args.blend_context = &args_;
  args.blend = [](void* context, int64_t begin, int64_t end) {
    kernels::table().blend(*static_cast<const kernels::BlendArgs*>(context), begin, end);
  };
}

StateBlend::StateBlend(const at::Tensor& x, double values_per_channel, const ops::MaybeTensor& weight,
                       const ops::MaybeTensor& bias, const at::Tensor& saved, State& state, const Config& config)
    : ChannelBlend(x, values_per_channel, weight, bias, saved, config.eps, config.variance),
      state_(state),
      config_(config) {
  if (!state.tracks()) return;
  running_mean_ = ChannelOutput(state.running_mean, accumulate_);
  running_var_ = ChannelOutput(state.running_var, accumulate_);
  view_mean_sum_ = ChannelOutput(state.view_mean_sum, accumulate_);
  view_var_sum_ = ChannelOutput(state.view_var_sum, accumulate_);
  const int64_t views = *state.view_count.const_data_ptr<int64_t>() + 1;
  args_.momentum = current_momentum(state);
  args_.running_factor = running_variance_factor(config.variance, args_.values_per_channel);
  args_.views = static_cast<double>(views);
  args_.completes_update = views >= config.views_per_update;
  args_.running_mean = running_mean_.data();
  args_.running_var = running_var_.data();
  args_.view_mean_sum = view_mean_sum_.data();
  args_.view_var_sum = view_var_sum_.data();
}

void StateBlend::finish() {
  if (!state_.tracks()) return;
  for (const auto* array : {&running_mean_, &running_var_, &view_mean_sum_, &view_var_sum_}) array->write_back();
  ++*state_.num_batches_tracked.mutable_data_ptr<int64_t>();
  *state_.view_count.mutable_data_ptr<int64_t>() = args_.completes_update ? 0 : static_cast<int64_t>(args_.views);
  if (args_.completes_update) {
    advance_schedule(state_.cur_iter, state_.momentum, config_.total_iters, config_.schedule);
  }
}

FunctionalBlend::FunctionalBlend(const at::Tensor& x, const ops::MaybeTensor& weight, const ops::MaybeTensor& bias,
                                 const at::Tensor& saved, const ops::MaybeTensor& running_mean,
                                 const ops::MaybeTensor& running_var, const FunctionalOptions& options,
                                 const at::Tensor& b_mean, const at::Tensor& b_var)
    : ChannelBlend(x, values_per_channel(x), weight, bias, saved, options.eps, options.variance),
      running_mean_(running_mean, accumulate_),
      running_var_(running_var, accumulate_) {
  args_.momentum = options.momentum;
  // Without sums of views they are only read.
  args_.running_mean = const_cast<void*>(running_mean_.data());
  args_.running_var = const_cast<void*>(running_var_.data());
  args_.batch_mean = b_mean.mutable_data_ptr();
  args_.batch_var = b_var.mutable_data_ptr();
}

BackwardCoefficients::BackwardCoefficients(const at::Tensor& saved, const ops::MaybeTensor& weight)
    : saved_(saved.contiguous()), channels_(saved.size(1)), numbers_(2 * pitch(channels_) + 2 * channels_) {
  const ChannelInput weights(weight, saved.scalar_type());
  if (saved.scalar_type() == at::kDouble) {
    fill(static_cast<const double*>(weights.data()));
  } else {
    fill(static_cast<const float*>(weights.data()));
  }
}

template <typename A>
void BackwardCoefficients::fill(const A* weight) {
  const A* mean = saved_.const_data_ptr<A>();
  const A* rstd = mean + 2 * channels_;
  A* scale = reinterpret_cast<A*>(numbers_.get());
  A* center = reinterpret_cast<A*>(numbers_.get() + pitch(channels_));
  for (int64_t c = 0; c < channels_; ++c) {
    scale[c] = weight ? static_cast<A>(static_cast<double>(weight[c]) * static_cast<double>(rstd[c])) : rstd[c];
    center[c] = mean[c];
  }
}

void BackwardCoefficients::attach(kernels::BackwardArgs& args) {
  args.scale = numbers_.get();
  args.center = numbers_.get() + pitch(channels_);
  args.sum_g = numbers_.get() + 2 * pitch(channels_);
  args.sum_gx = args.sum_g + channels_;
}

void BackwardCoefficients::write_dweight(const at::Tensor& dweight) {
  const ChannelOutput out(dweight, saved_.scalar_type());
  const double* sum_g = numbers_.get() + 2 * pitch(channels_);
  const double* sum_gx = sum_g + channels_;
  const auto write = [&](auto* to, const auto* mean) {
    const auto* rest = mean + channels_;
    const auto* rstd = rest + channels_;
    for (int64_t c = 0; c < channels_; ++c) {
      to[c] = static_cast<std::remove_reference_t<decltype(*to)>>(
          (sum_gx[c] - static_cast<double>(rest[c]) * sum_g[c]) * static_cast<double>(rstd[c]));
    }
  };
  if (saved_.scalar_type() == at::kDouble) {
    write(static_cast<double*>(out.data()), saved_.const_data_ptr<double>());
  } else {
    write(static_cast<float*>(out.data()), saved_.const_data_ptr<float>());
  }
  out.write_back();
}

void BackwardCoefficients::write_dbias(const at::Tensor& dbias) {
  const double* sum_g = numbers_.get() + 2 * pitch(channels_);
  const ChannelOutput out(dbias, saved_.scalar_type());
  if (saved_.scalar_type() == at::kDouble) {
    std::copy_n(sum_g, channels_, static_cast<double*>(out.data()));
  } else {
    auto* to = static_cast<float*>(out.data());
    for (int64_t c = 0; c < channels_; ++c) to[c] = static_cast<float>(sum_g[c]);
  }
  out.write_back();
}

}  // namespace momentum_bn::cpu
