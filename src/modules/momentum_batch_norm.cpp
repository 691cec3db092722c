#include <momentum_bn/modules.h>
#include <momentum_bn/schedule.h>
#include <momentum_bn/teacher.h>

#include "ops/checks.h"
#include "ops/composite/formulas.h"
#include "ops/group.h"
#include "ops/ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/serialize/input-archive.h>

#include <algorithm>
#include <array>
#include <unordered_set>

namespace momentum_bn {
namespace {

/// Stands in the momentum buffer where there is none: the cumulative average.
constexpr double kCumulative = -1;

double to_state(std::optional<double> momentum) { return momentum.value_or(kCumulative); }

/// The buffers that a plain BatchNorm does not have.
constexpr std::array<const char*, 5> kOwnBuffers = {"view_mean_sum", "view_var_sum", "view_count", "cur_iter_state",
                                                    "momentum_state"};

bool is_own_buffer(const std::string& name) {
  return std::find(kOwnBuffers.begin(), kOwnBuffers.end(), name) != kOwnBuffers.end();
}

/// Of sums of the views beside statistics of `dtype`: a sum may overflow float16 where the mean fits.
at::ScalarType sum_type(at::ScalarType dtype) { return at::isReducedFloatingType(dtype) ? at::kFloat : dtype; }

bool is_view_sum(const std::string& name) { return name == "view_mean_sum" || name == "view_var_sum"; }

void check_options(const MomentumBatchNormOptions& options) {
  TORCH_CHECK_VALUE(options.num_features() >= 0, "num_features must be at least 0 (got ", options.num_features(), ")");
  check_eps(options.eps());
  check_momentum(options.momentum());
  check_total_iters(options.total_iters());
  check_views_per_update(options.views_per_update());
  if (options.process_group()) check_process_group(*options.process_group());
}

at::ScalarType schedule_type(std::optional<c10::Device> device) {
  return device && device->is_mps() ? at::kFloat : at::kDouble;
}

}  // namespace

MomentumBatchNormLayer::MomentumBatchNormLayer(const MomentumBatchNormOptions& layer_options)
    : options(layer_options), untracked_momentum_(layer_options.momentum()) {
  check_options(options);
}

void MomentumBatchNormLayer::register_state(torch::nn::Module& module) {
  const auto values = at::TensorOptions().device(options.device()).dtype(options.dtype());
  const auto counter = at::TensorOptions().device(options.device()).dtype(at::kLong);
  const int64_t channels = options.num_features();
  const bool with_bias = options.affine() && options.bias();
  weight = module.register_parameter("weight", options.affine() ? at::empty({channels}, values) : at::Tensor(),
                                     options.affine());
  bias = module.register_parameter("bias", with_bias ? at::empty({channels}, values) : at::Tensor(), with_bias);
  if (options.track_running_stats()) {
    running_mean = module.register_buffer("running_mean", at::zeros({channels}, values));
    running_var = module.register_buffer("running_var", at::ones({channels}, values));
    num_batches_tracked = module.register_buffer("num_batches_tracked", at::zeros({}, counter));
    const auto sums = values.dtype(sum_type(running_mean.scalar_type()));
    view_mean_sum = module.register_buffer("view_mean_sum", at::zeros({channels}, sums));
    view_var_sum = module.register_buffer("view_var_sum", at::zeros({channels}, sums));
    view_count = module.register_buffer("view_count", at::zeros({}, counter));
    cur_iter_state = module.register_buffer("cur_iter_state", at::zeros({}, counter));
    momentum_state = module.register_buffer(
        "momentum_state", at::full({}, to_state(options.momentum()), counter.dtype(schedule_type(options.device()))));
  }
  reset_parameters();
}

std::optional<double> MomentumBatchNormLayer::momentum() const {
  if (!options.track_running_stats()) return untracked_momentum_;
  const auto value = momentum_state.item<double>();
  return value < 0 ? std::nullopt : std::optional<double>(value);
}

void MomentumBatchNormLayer::set_momentum(std::optional<double> momentum) {
  check_momentum(momentum);
  if (!options.track_running_stats()) {
    untracked_momentum_ = momentum;
    return;
  }
  torch::NoGradGuard no_grad;
  momentum_state.fill_(to_state(momentum));
}

int64_t MomentumBatchNormLayer::cur_iter() const {
  return options.track_running_stats() ? cur_iter_state.item<int64_t>() : untracked_cur_iter_;
}

void MomentumBatchNormLayer::set_cur_iter(int64_t cur_iter) {
  check_cur_iter(cur_iter);
  if (!options.track_running_stats()) {
    untracked_cur_iter_ = cur_iter;
    return;
  }
  torch::NoGradGuard no_grad;
  cur_iter_state.fill_(cur_iter);
}

void MomentumBatchNormLayer::set_total_iters(int64_t total_iters) {
  check_total_iters(total_iters);
  options.total_iters(total_iters);
}

void MomentumBatchNormLayer::momentum_cosine_decay() {
  if (options.track_running_stats()) {
    torch::NoGradGuard no_grad;
    return ops::advance_schedule_(cur_iter_state, momentum_state, options.total_iters(), to_word(options.schedule()));
  }
  ++untracked_cur_iter_;
  if (options.schedule() == Schedule::Cosine && untracked_momentum_) {
    untracked_momentum_ = scheduled_momentum(untracked_cur_iter_, options.total_iters());
  }
}

void MomentumBatchNormLayer::reset_running_stats() {
  restart_schedule();
  if (!options.track_running_stats()) return;
  torch::NoGradGuard no_grad;
  running_mean.zero_();
  running_var.fill_(1);
  num_batches_tracked.zero_();
}

void MomentumBatchNormLayer::restart_schedule() {
  untracked_momentum_ = options.momentum();
  untracked_cur_iter_ = 0;
  if (!options.track_running_stats()) return;
  torch::NoGradGuard no_grad;
  view_mean_sum.zero_();
  view_var_sum.zero_();
  view_count.zero_();
  cur_iter_state.zero_();
  momentum_state.fill_(to_state(options.momentum()));
}

void MomentumBatchNormLayer::reset_parameters() {
  reset_running_stats();
  torch::NoGradGuard no_grad;
  if (weight.defined()) weight.fill_(1);
  if (bias.defined()) bias.zero_();
}

at::Tensor MomentumBatchNormLayer::forward_checked(const at::Tensor& x, const at::Tensor& residual, bool training) {
  check_input(x, residual);
  check_channels(x, options.num_features());
  const auto activation = to_word(options.activation());
  const auto word = ops::word_of(activation);
  // In evaluation a batch that normalises itself does so by itself.
  const auto group = training ? ops::word_of(options.process_group()) : std::nullopt;
  const bool x_needed_again = at::GradMode::is_enabled() && weight.defined() && weight.requires_grad();
  const bool overwrite = options.inplace() && !x_needed_again;

  if (training || !options.track_running_stats()) {
    std::vector<at::Tensor> state;
    if (options.track_running_stats()) {
      state = {running_mean, running_var, num_batches_tracked, view_mean_sum,
               view_var_sum, view_count,  cur_iter_state,      momentum_state};
    }
    if (overwrite) {
      at::Tensor y = x;
      ops::forward_train_(y, residual, weight, bias, state, options.eps(), options.total_iters(),
                          options.views_per_update(), to_word(options.schedule()), to_word(options.variance()), word,
                          group, std::nullopt);
      return y;
    }
    return std::get<0>(ops::forward_train(x, residual, weight, bias, state, options.eps(), options.total_iters(),
                                          options.views_per_update(), to_word(options.schedule()),
                                          to_word(options.variance()), word, group, std::nullopt));
  }
  if (overwrite) {
    at::Tensor y = x;
    ops::forward_eval_(y, residual, weight, bias, running_mean, running_var, options.eps(), word);
    return y;
  }
  return composite::evaluate(x, residual, weight, bias, running_mean, running_var, options.eps(), options.activation());
}

void MomentumBatchNormLayer::load_state(torch::nn::Module& module, torch::serialize::InputArchive& archive) {
  if (!options.track_running_stats()) return module.torch::nn::Module::load(archive);
  const auto has = [&archive](const char* name) {
    at::Tensor value;  // a new one for each: what was read shares memory with the archive
    return archive.try_read(name, value, /*is_buffer=*/true);
  };
  const bool plain = std::none_of(kOwnBuffers.begin(), kOwnBuffers.end(), has);

  // Everything is read before anything is changed.
  std::vector<std::pair<at::Tensor, at::Tensor>> loaded;
  for (auto& parameter : module.named_parameters(/*recurse=*/false)) {
    at::Tensor value;
    archive.read(parameter.key(), value);
    loaded.emplace_back(parameter.value(), value);
  }
  for (auto& buffer : module.named_buffers(/*recurse=*/false)) {
    if (plain && is_own_buffer(buffer.key())) continue;
    at::Tensor value;
    archive.read(buffer.key(), value, /*is_buffer=*/true);
    if (is_view_sum(buffer.key())) value = value.to(sum_type(value.scalar_type()));
    loaded.emplace_back(buffer.value(), value);
  }
  torch::NoGradGuard no_grad;
  for (auto& [tensor, value] : loaded) tensor.set_data(value.to(tensor.device()));
  if (!plain) return;
  view_mean_sum.zero_();
  view_var_sum.zero_();
  view_count.zero_();
}

void MomentumBatchNormLayer::pretty_print_as(std::ostream& stream, const char* name) const {
  const auto momentum_now = momentum();
  stream << std::boolalpha << "momentum_bn::" << name << "(" << options.num_features() << ", eps=" << options.eps()
         << ", momentum=";
  momentum_now ? stream << *momentum_now : stream << "None";
  stream << ", affine=" << options.affine() << ", track_running_stats=" << options.track_running_stats()
         << ", total_iters=" << options.total_iters() << ", views_per_update=" << options.views_per_update()
         << ", schedule=" << to_word(options.schedule()) << ", variance=" << to_word(options.variance());
  if (const auto word = to_word(options.activation())) stream << ", activation=" << *word;
  if (options.inplace()) stream << ", inplace=true";
  if (options.process_group()) stream << ", process_group=" << *options.process_group();
  stream << ")";
}

void MomentumBatchNormLayer::keep_precision_while(std::optional<c10::Device> target,
                                                  const std::function<void()>& cast) {
  if (!options.track_running_stats()) return cast();
  const std::array<at::Tensor*, 6> kept = {&num_batches_tracked, &view_count,    &cur_iter_state,
                                           &momentum_state,      &view_mean_sum, &view_var_sum};
  std::array<at::Tensor, 6> values;
  for (size_t i = 0; i < kept.size(); ++i) values[i] = kept[i]->detach().clone();
  torch::NoGradGuard no_grad;
  // A device without float64 refuses to take one.
  if (target && target->is_mps()) momentum_state.set_data(momentum_state.to(at::kFloat));
  cast();
  const auto device = running_mean.device();
  const auto sums = sum_type(running_mean.scalar_type());
  const std::array<at::ScalarType, 6> types = {at::kLong, at::kLong, at::kLong, schedule_type(device), sums, sums};
  for (size_t i = 0; i < kept.size(); ++i) {
    kept[i]->set_data(values[i].to(at::TensorOptions().device(device).dtype(types[i])));
  }
}

template <size_t D, typename Derived>
MomentumBatchNormImplBase<D, Derived>::MomentumBatchNormImplBase(const MomentumBatchNormOptions& layer_options)
    : MomentumBatchNormLayer(layer_options) {
  // NOLINTNEXTLINE(clang-analyzer-optin.cplusplus.VirtualCall): as torch's own modules do
  reset();
}

template <size_t D, typename Derived>
void MomentumBatchNormImplBase<D, Derived>::reset() {
  register_state(*this);
}

template <size_t D, typename Derived>
at::Tensor MomentumBatchNormImplBase<D, Derived>::forward(const at::Tensor& x, const at::Tensor& residual) {
  if constexpr (D == 1) {
    TORCH_CHECK_VALUE(x.dim() == 2 || x.dim() == 3, "expected 2D or 3D input (got ", x.dim(), "D input)");
  } else {
    TORCH_CHECK_VALUE(x.dim() == D + 2, "expected ", D + 2, "D input (got ", x.dim(), "D input)");
  }
  return forward_checked(x, residual, this->is_training());
}

template <size_t D, typename Derived>
void MomentumBatchNormImplBase<D, Derived>::pretty_print(std::ostream& stream) const {
  constexpr std::array<const char*, 3> kNames = {"MomentumBatchNorm1d", "MomentumBatchNorm2d", "MomentumBatchNorm3d"};
  pretty_print_as(stream, kNames[D - 1]);
}

template <size_t D, typename Derived>
void MomentumBatchNormImplBase<D, Derived>::load(torch::serialize::InputArchive& archive) {
  load_state(*this, archive);
}

template <size_t D, typename Derived>
void MomentumBatchNormImplBase<D, Derived>::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  keep_precision_while(device, [&] { torch::nn::Module::to(device, dtype, non_blocking); });
}

template <size_t D, typename Derived>
void MomentumBatchNormImplBase<D, Derived>::to(torch::Dtype dtype, bool non_blocking) {
  keep_precision_while(std::nullopt, [&] { torch::nn::Module::to(dtype, non_blocking); });
}

template <size_t D, typename Derived>
void MomentumBatchNormImplBase<D, Derived>::to(torch::Device device, bool non_blocking) {
  keep_precision_while(device, [&] { torch::nn::Module::to(device, non_blocking); });
}

template class MomentumBatchNormImplBase<1, MomentumBatchNorm1dImpl>;
template class MomentumBatchNormImplBase<2, MomentumBatchNorm2dImpl>;
template class MomentumBatchNormImplBase<3, MomentumBatchNorm3dImpl>;

void set_total_iters(torch::nn::Module& module, int64_t total_iters) {
  check_total_iters(total_iters);
  const auto set = [total_iters](torch::nn::Module& part) {
    if (auto* layer = dynamic_cast<MomentumBatchNormLayer*>(&part)) layer->set_total_iters(total_iters);
    if (auto* teacher = dynamic_cast<MomentumTeacherBase*>(&part)) teacher->set_total_iters(total_iters);
  };
  set(module);
  for (const auto& child : module.modules(/*include_self=*/false)) set(*child);
}

torch::OrderedDict<std::string, at::Tensor> plain_state_dict(const torch::nn::Module& module) {
  // By layer, not by name: another module's buffer may be called like one of ours.
  std::unordered_set<std::string> own;
  const auto add_own = [&own](const torch::nn::Module& child, const std::string& prefix) {
    if (!dynamic_cast<const MomentumBatchNormLayer*>(&child)) return;
    for (const char* name : kOwnBuffers) own.insert(prefix + name);
  };
  add_own(module, "");
  for (const auto& child : module.named_modules("", /*include_self=*/false)) add_own(*child.value(), child.key() + ".");

  torch::OrderedDict<std::string, at::Tensor> state;
  for (const auto& parameter : module.named_parameters()) state.insert(parameter.key(), parameter.value());
  for (const auto& buffer : module.named_buffers()) {
    if (own.count(buffer.key()) == 0) state.insert(buffer.key(), buffer.value());
  }
  return state;
}

}  // namespace momentum_bn
