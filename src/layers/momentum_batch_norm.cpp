#include <momentum_bn/modules.h>
#include <momentum_bn/schedule.h>
#include <momentum_bn/teacher.h>

#include "ops/normalise/calls.h"
#include "ops/normalise/options.h"

#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <unordered_set>

namespace momentum_bn {
namespace {

/// The value of the momentum buffer that stands for no momentum: a cumulative average.
constexpr double kCumulative = -1;

double to_state(std::optional<double> momentum) { return momentum.value_or(kCumulative); }

/// The buffers that a plain BatchNorm does not have.
constexpr std::array<const char*, 5> kOwnBuffers = {"view_mean_sum", "view_var_sum", "view_count", "cur_iter_state",
                                                    "momentum_state"};

/// The dtype of the sums of the views beside statistics of `dtype`: a sum may overflow float16 where the mean fits.
at::ScalarType sum_type(at::ScalarType dtype) { return at::isReducedFloatingType(dtype) ? at::kFloat : dtype; }

at::ScalarType schedule_type(std::optional<c10::Device> device) {
  return device && device->is_mps() ? at::kFloat : at::kDouble;
}

}  // namespace

MomentumBatchNormLayer::MomentumBatchNormLayer(const MomentumBatchNormOptions& layer_options)
    : options(layer_options), untracked_momentum_(layer_options.momentum()) {
  check(options);
}

void MomentumBatchNormLayer::register_own_state(torch::nn::Module& module) {
  const auto counter = at::TensorOptions().device(options.device()).dtype(at::kLong);
  const auto sums = running_mean.options().dtype(sum_type(running_mean.scalar_type()));
  view_mean_sum = module.register_buffer("view_mean_sum", at::zeros({options.num_features()}, sums));
  view_var_sum = module.register_buffer("view_var_sum", at::zeros({options.num_features()}, sums));
  view_count = module.register_buffer("view_count", at::zeros({}, counter));
  cur_iter_state = module.register_buffer("cur_iter_state", at::zeros({}, counter));
  momentum_state = module.register_buffer(
      "momentum_state", at::full({}, to_state(options.momentum()), counter.dtype(schedule_type(options.device()))));
}

std::optional<double> MomentumBatchNormLayer::momentum() const {
  if (!options.track_running_stats()) {
    return untracked_momentum_;
  }
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
    return ops::call(
        ops::AdvanceSchedule{cur_iter_state, momentum_state, options.total_iters(), to_word(options.schedule())});
  }
  ++untracked_cur_iter_;
  if (options.schedule() == Schedule::Cosine && untracked_momentum_) {
    untracked_momentum_ = scheduled_momentum(untracked_cur_iter_, options.total_iters());
  }
}

void MomentumBatchNormLayer::reset_running_stats() {
  restart_schedule();
  NormLayer::reset_running_stats();
}

void MomentumBatchNormLayer::restart_schedule() {
  untracked_momentum_ = options.momentum();
  untracked_cur_iter_ = 0;
  if (!options.track_running_stats()) {
    return;
  }
  forget_views();
  torch::NoGradGuard no_grad;
  cur_iter_state.zero_();
  momentum_state.fill_(to_state(options.momentum()));
}

std::vector<at::Tensor> MomentumBatchNormLayer::state() const {
  return {running_mean, running_var, num_batches_tracked, view_mean_sum,
          view_var_sum, view_count,  cur_iter_state,      momentum_state};
}

std::vector<std::string> MomentumBatchNormLayer::own_buffers() const {
  return options.track_running_stats() ? std::vector<std::string>(kOwnBuffers.begin(), kOwnBuffers.end())
                                       : std::vector<std::string>();
}

std::vector<NormLayer::KeptBuffer> MomentumBatchNormLayer::kept_buffers() {
  auto kept = NormLayer::kept_buffers();
  if (options.track_running_stats()) {
    const auto sums = sum_type(running_mean.scalar_type());
    kept.insert(kept.end(), {{&view_count, at::kLong},
                             {&cur_iter_state, at::kLong},
                             {&momentum_state, schedule_type(running_mean.device())},
                             {&view_mean_sum, sums},
                             {&view_var_sum, sums}});
  }
  return kept;
}

void MomentumBatchNormLayer::after_load(bool plain) {
  for (auto* sum : {&view_mean_sum, &view_var_sum}) {
    sum->set_data(sum->to(sum_type(running_mean.scalar_type())));
  }
  if (plain) {
    forget_views();
  }
}

void MomentumBatchNormLayer::forget_views() {
  torch::NoGradGuard no_grad;
  view_mean_sum.zero_();
  view_var_sum.zero_();
  view_count.zero_();
}

void MomentumBatchNormLayer::print(std::ostream& stream, size_t dimensions) const {
  const auto momentum_now = momentum();
  stream << std::boolalpha << "momentum_bn::MomentumBatchNorm" << dimensions << "d(" << options.num_features()
         << ", eps=" << options.eps() << ", momentum=";
  momentum_now ? stream << *momentum_now : stream << "None";
  stream << ", affine=" << options.affine() << ", track_running_stats=" << options.track_running_stats()
         << ", total_iters=" << options.total_iters() << ", views_per_update=" << options.views_per_update()
         << ", schedule=" << to_word(options.schedule()) << ", variance=" << to_word(options.variance());
  print_extensions(stream);
  if (!options.detach_statistics()) {
    stream << ", detach_statistics=false";
  }
  stream << ")";
}

void set_total_iters(torch::nn::Module& module, int64_t total_iters) {
  check_total_iters(total_iters);
  const auto set = [total_iters](torch::nn::Module& part) {
    if (auto* layer = dynamic_cast<MomentumBatchNormLayer*>(&part)) {
      layer->set_total_iters(total_iters);
    }
    if (auto* teacher = dynamic_cast<MomentumTeacherBase*>(&part)) {
      teacher->set_total_iters(total_iters);
    }
  };
  set(module);
  for (const auto& child : module.modules(/*include_self=*/false)) {
    set(*child);
  }
}

torch::OrderedDict<std::string, at::Tensor> plain_state_dict(const torch::nn::Module& module) {
  // By layer, not by name: another module's buffer may be called like one of ours.
  std::unordered_set<std::string> own;
  const auto add_own = [&own](const torch::nn::Module& child, const std::string& prefix) {
    if (!dynamic_cast<const MomentumBatchNormLayer*>(&child)) {
      return;
    }
    for (const char* name : kOwnBuffers) {
      own.insert(prefix + name);
    }
  };
  add_own(module, "");
  for (const auto& child : module.named_modules("", /*include_self=*/false)) {
    add_own(*child.value(), child.key() + ".");
  }

  torch::OrderedDict<std::string, at::Tensor> state;
  for (const auto& parameter : module.named_parameters()) {
    state.insert(parameter.key(), parameter.value());
  }
  for (const auto& buffer : module.named_buffers()) {
    if (own.count(buffer.key()) == 0) {
      state.insert(buffer.key(), buffer.value());
    }
  }
  return state;
}

}  // namespace momentum_bn
