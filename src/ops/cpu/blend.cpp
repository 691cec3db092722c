#include "ops/cpu/blend.h"

#include <ATen/ops/empty.h>
#include <momentum_bn/schedule.h>

#include <cmath>

namespace momentum_bn::cpu {
namespace {

at::Tensor tensor_or_none(const ops::MaybeTensor& tensor) { return tensor ? *tensor : at::Tensor(); }

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

}  // namespace

void advance_schedule(at::Tensor& cur_iter, at::Tensor& momentum, int64_t total_iters, Schedule schedule) {
  const int64_t next = ++*cur_iter.mutable_data_ptr<int64_t>();
  if (schedule == Schedule::Cosine && read_momentum(momentum) >= 0) {
    write_momentum(momentum, scheduled_momentum(next, total_iters));
  }
}

ChannelValues::ChannelValues(const at::Tensor& values) {
  if (!values.defined() || values.numel() == 0) return;
  data_ = const_cast<void*>(values.const_data_ptr());
  stride_ = values.stride(0);
  dtype_ = values.scalar_type();
}

double ChannelValues::operator[](int64_t channel) const {
  const int64_t at = channel * stride_;
  switch (dtype_) {
    case at::kFloat:
      return static_cast<const float*>(data_)[at];
    case at::kDouble:
      return static_cast<const double*>(data_)[at];
    case at::kBFloat16:
      return static_cast<const c10::BFloat16*>(data_)[at];
    default:
      return static_cast<const c10::Half*>(data_)[at];
  }
}

void ChannelValues::set(int64_t channel, double value) const {
  const int64_t at = channel * stride_;
  switch (dtype_) {
    case at::kFloat:
      static_cast<float*>(data_)[at] = static_cast<float>(value);
      return;
    case at::kDouble:
      static_cast<double*>(data_)[at] = value;
      return;
    case at::kBFloat16:
      static_cast<c10::BFloat16*>(data_)[at] = static_cast<float>(value);
      return;
    default:
      static_cast<c10::Half*>(data_)[at] = static_cast<float>(value);
  }
}

ChannelBlend::ChannelBlend(const at::Tensor& x, const ops::MaybeTensor& weight, const ops::MaybeTensor& bias,
                           const at::Tensor& saved, double eps)
    : n_(static_cast<double>(x.numel()) / static_cast<double>(x.size(1))),
      eps_(eps),
      channels_(x.size(1)),
      in_double_(x.scalar_type() == at::kDouble),
      weight_(tensor_or_none(weight)),
      bias_(tensor_or_none(bias)),
      saved_(saved),
      statistics_(new double[static_cast<size_t>(2 * channels_)]),
      coefficients_(new double[static_cast<size_t>(3 * (channels_ + kernels::kPadding))]) {}

void ChannelBlend::attach(kernels::ForwardArgs& args) {
  const int64_t pitch = channels_ + kernels::kPadding;
  args.mean = statistics_.get();
  args.m2 = statistics_.get() + channels_;
  args.center = coefficients_.get();
  args.scale = coefficients_.get() + pitch;
  args.shift = coefficients_.get() + 2 * pitch;
  args.blend_context = this;
  args.blend = [](void* context, int64_t begin, int64_t end) {
    auto* self = static_cast<ChannelBlend*>(context);
    self->in_double_ ? self->run<double>(begin, end) : self->run<float>(begin, end);
  };
}

template <typename A>
void ChannelBlend::run(int64_t begin, int64_t end) {
  const int64_t pitch = channels_ + kernels::kPadding;
  auto* center = reinterpret_cast<A*>(coefficients_.get());
  auto* scale = reinterpret_cast<A*>(coefficients_.get() + pitch);
  auto* shift = reinterpret_cast<A*>(coefficients_.get() + 2 * pitch);
  A* saved = static_cast<A*>(saved_.data_ptr());
  for (int64_t c = begin; c < end; ++c) {
    double mean = statistics_[static_cast<size_t>(c)];
    double var = statistics_[static_cast<size_t>(channels_ + c)] / (n_ - 1);
    blend(c, mean, var);
    const double rstd = 1 / std::sqrt(var + eps_);
    const double factor = weight_.defined() ? weight_[c] * rstd : rstd;
    // What the mean loses to rounding goes into the shift: exact also where it is far larger than the deviation.
    const A rounded = static_cast<A>(mean);
    const double rest = std::isfinite(rounded) ? mean - static_cast<double>(rounded) : 0;
    center[c] = rounded;
    scale[c] = static_cast<A>(factor);
    shift[c] = static_cast<A>((bias_.defined() ? bias_[c] : 0) - rest * factor);
    saved[c] = rounded;
    saved[channels_ + c] = static_cast<A>(rest);
    saved[2 * channels_ + c] = static_cast<A>(rstd);
  }
}

StateBlend::StateBlend(const at::Tensor& x, const ops::MaybeTensor& weight, const ops::MaybeTensor& bias,
                       const at::Tensor& saved, State& state, const Config& config)
    : ChannelBlend(x, weight, bias, saved, config.eps), state_(state), config_(config) {
  if (!state.tracks()) return;
  momentum_ = current_momentum(state);
  views_ = *state.view_count.const_data_ptr<int64_t>() + 1;
  completes_ = views_ >= config.views_per_update;
  running_mean_ = ChannelValues(state.running_mean);
  running_var_ = ChannelValues(state.running_var);
  view_mean_sum_ = ChannelValues(state.view_mean_sum);
  view_var_sum_ = ChannelValues(state.view_var_sum);
}

void StateBlend::blend(int64_t channel, double& mean, double& var) {
  const double b_mean = mean;
  const double b_var = var;
  var = b_var * normalising_variance_factor(config_.variance, n());
  if (!state_.tracks()) return;

  const double running_mean = running_mean_[channel];
  const double running_var = running_var_[channel];
  mean = momentum_ * b_mean + (1 - momentum_) * running_mean;
  var = momentum_ * var + (1 - momentum_) * running_var;

  const double mean_sum = view_mean_sum_[channel] + b_mean;
  const double var_sum = view_var_sum_[channel] + b_var;
  if (!completes_) {
    view_mean_sum_.set(channel, mean_sum);
    view_var_sum_.set(channel, var_sum);
    return;
  }
  const double views = static_cast<double>(views_);
  const double v_run = var_sum / views * running_variance_factor(config_.variance, n());
  running_mean_.set(channel, momentum_ * (mean_sum / views) + (1 - momentum_) * running_mean);
  running_var_.set(channel, momentum_ * v_run + (1 - momentum_) * running_var);
  view_mean_sum_.set(channel, 0);
  view_var_sum_.set(channel, 0);
}

void StateBlend::finish() {
  if (!state_.tracks()) return;
  ++*state_.num_batches_tracked.mutable_data_ptr<int64_t>();
  *state_.view_count.mutable_data_ptr<int64_t>() = completes_ ? 0 : views_;
  if (completes_) advance_schedule(state_.cur_iter, state_.momentum, config_.total_iters, config_.schedule);
}

FunctionalBlend::FunctionalBlend(const at::Tensor& x, const ops::MaybeTensor& weight, const ops::MaybeTensor& bias,
                                 const at::Tensor& saved, const ops::MaybeTensor& running_mean,
                                 const ops::MaybeTensor& running_var, const FunctionalOptions& options,
                                 const at::Tensor& b_mean, const at::Tensor& b_var)
    : ChannelBlend(x, weight, bias, saved, options.eps),
      options_(options),
      running_mean_(tensor_or_none(running_mean)),
      running_var_(tensor_or_none(running_var)),
      b_mean_(b_mean),
      b_var_(b_var) {}

void FunctionalBlend::blend(int64_t channel, double& mean, double& var) {
  b_mean_.set(channel, mean);
  b_var_.set(channel, var);
  var *= normalising_variance_factor(options_.variance, n());
  if (!running_mean_.defined()) return;
  const double m = options_.momentum;
  mean = m * mean + (1 - m) * running_mean_[channel];
  var = m * var + (1 - m) * running_var_[channel];
}

BackwardCoefficients::BackwardCoefficients(const at::Tensor& saved, const ops::MaybeTensor& weight)
    : saved_(saved.contiguous()),
      channels_(saved.size(1)),
      scale_(at::empty({channels_ + kernels::kPadding}, saved.options())),
      center_(at::empty({channels_ + kernels::kPadding}, saved.options())),
      sums_(new double[static_cast<size_t>(2 * channels_)]) {
  const ChannelValues weights(tensor_or_none(weight));
  const ChannelValues rows(saved_.view(-1));
  const ChannelValues scale(scale_);
  const ChannelValues center(center_);
  for (int64_t c = 0; c < channels_; ++c) {
    const double rstd = rows[2 * channels_ + c];
    scale.set(c, weights.defined() ? weights[c] * rstd : rstd);
    center.set(c, rows[c]);
  }
}

void BackwardCoefficients::attach(kernels::BackwardArgs& args) {
  args.scale = scale_.const_data_ptr();
  args.center = center_.const_data_ptr();
  args.sum_g = sums_.get();
  args.sum_gx = sums_.get() + channels_;
}

void BackwardCoefficients::write_dweight(const at::Tensor& dweight) const {
  const ChannelValues rows(saved_.view(-1));
  const ChannelValues out(dweight);
  for (int64_t c = 0; c < channels_; ++c) {
    const double sum_g = sums_[static_cast<size_t>(c)];
    const double sum_gx = sums_[static_cast<size_t>(channels_ + c)];
    out.set(c, (sum_gx - rows[channels_ + c] * sum_g) * rows[2 * channels_ + c]);
  }
}

void BackwardCoefficients::write_dbias(const at::Tensor& dbias) const {
  const ChannelValues out(dbias);
  for (int64_t c = 0; c < channels_; ++c) out.set(c, sums_[static_cast<size_t>(c)]);
}

}  // namespace momentum_bn::cpu
