#include <momentum_bn/teacher.h>

#include "ops/normalise/options.h"
#include "ops/teacher/call.h"
#include "ops/teacher/update.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace momentum_bn {
namespace {

bool needs_master(const at::Tensor& parameter) { return at::isReducedFloatingType(parameter.scalar_type()); }

bool has_values(const at::Tensor& master) { return master.numel() > 0; }

/// Takes the parameter into a master of which it is not the rounding; without waiting for a GPU.
void renew_if_stale(at::Tensor& master, const at::Tensor& parameter) {
  const auto is_stale = master.to(parameter.scalar_type()).ne(parameter).any();
  master.copy_(at::where(is_stale, parameter.to(at::kFloat), master));
}

/// Whether a wide parameter is what a cast made of the 16-bit rounding of its master.
bool is_rounding(const at::Tensor& parameter, const at::Tensor& master) {
  return parameter.equal(master.to(at::kBFloat16).to(parameter.scalar_type())) ||
         parameter.equal(master.to(at::kHalf).to(parameter.scalar_type()));
}

std::vector<MomentumBatchNormLayer*> layers_of(const torch::nn::Module& module) {
  std::vector<MomentumBatchNormLayer*> layers;
  for (const auto& part : module.modules()) {
    if (auto* layer = dynamic_cast<MomentumBatchNormLayer*>(part.get())) {
      layers.push_back(layer);
    }
  }
  return layers;
}

bool follows_cosine(const MomentumBatchNormOptions& options) {
  return options.track_running_stats() && options.schedule() == Schedule::Cosine && options.momentum();
}

}  // namespace

void MomentumTeacherBase::attach(torch::nn::Module& student, std::shared_ptr<torch::nn::Module> teacher,
                                 int64_t total_iters, double param_momentum) {
  check_total_iters(total_iters);
  check_param_momentum(param_momentum);
  teacher_ = std::move(teacher);
  total_iters_ = total_iters;
  start_ = param_momentum;
  const auto pairs = paired_with(student);

  torch::NoGradGuard no_grad;
  register_module("module", teacher_);
  teacher_->train();
  momentum_bn::set_total_iters(*teacher_, total_iters);
  auto parameters = teacher_->parameters();
  auto counter = at::TensorOptions().dtype(at::kLong);
  if (!parameters.empty()) {
    counter = counter.device(parameters.front().device());
  }
  updates_state_ = register_buffer("updates", at::zeros({}, counter));
  for (size_t i = 0; i < parameters.size(); ++i) {
    at::Tensor& target = parameters[i];
    const auto& [name, source] = pairs[i];
    target.set_requires_grad(false);
    masters_.push_back(at::empty({0}, target.options().dtype(at::kFloat)));
    if (needs_master(target)) {
      set_master(i, name, source.detach().to(target.device(), at::kFloat, /*non_blocking=*/false, /*copy=*/true));
      target.copy_(masters_[i]);
    } else {
      target.copy_(source);
    }
  }
}

std::vector<std::pair<std::string, at::Tensor>> MomentumTeacherBase::paired_with(
    const torch::nn::Module& student) const {
  const auto sources = student.named_parameters();
  std::vector<std::pair<std::string, at::Tensor>> pairs;
  for (const auto& item : teacher_->named_parameters()) {
    const auto* source = sources.find(item.key());
    TORCH_CHECK_VALUE(source, "student has no parameter named '", item.key(), "', which the teacher has");
    TORCH_CHECK_VALUE(source->sizes() == item->sizes(), "student's parameter '", item.key(), "' has shape ",
                      source->sizes(), ", the teacher's has ", item->sizes());
    pairs.emplace_back(item.key(), *source);
  }
  return pairs;
}

void MomentumTeacherBase::update_from(const torch::nn::Module& student) {
  torch::NoGradGuard no_grad;
  std::vector<at::Tensor> targets = teacher_->parameters();
  std::vector<at::Tensor> sources;
  for (const auto& pair : paired_with(student)) {
    sources.push_back(pair.second.detach());
  }
  check_pace();
  refresh_masters();
  ops::call(ops::TeacherUpdate{targets, masters_, sources, updates_state_, total_iters_, start_});
  forwards_ = 0;
}

void MomentumTeacherBase::count_forward() {
  if (forwards_ >= 0 && teacher_->is_training()) {
    ++forwards_;
  }
}

void MomentumTeacherBase::check_pace() {
  const int64_t forwards = forwards_;
  if (forwards <= 0 || has_warned_) {
    return;
  }
  for (const auto* layer : layers_of(*teacher_)) {
    const int64_t views = layer->options.views_per_update();
    if (views == forwards || !follows_cosine(layer->options)) {
      continue;
    }
    has_warned_ = true;
    TORCH_WARN("between two updates this teacher ran ", forwards,
               " training forwards, but its layers have views_per_update=", views, ": their schedule runs ",
               static_cast<double>(forwards) / static_cast<double>(views),
               " times as fast as the parameters'. Build the layers with views_per_update(", forwards,
               "): the forwards per batch (2 views, or 1 where views are concatenated) times the batches over which a "
               "step accumulates gradients");
    return;
  }
}

void MomentumTeacherBase::refresh_masters() {
  const auto parameters = teacher_->named_parameters();
  for (size_t i = 0; i < masters_.size(); ++i) {
    at::Tensor parameter = parameters[i].value();
    at::Tensor& master = masters_[i];
    if (!has_values(master)) {
      if (needs_master(parameter)) {
        set_master(i, parameters[i].key(), parameter.detach().to(at::kFloat));
      }
    } else if (needs_master(parameter)) {
      renew_if_stale(master, parameter);
    } else {
      if (is_rounding(parameter, master)) {
        parameter.copy_(master);
      }
      master.set_data(at::empty({0}, master.options()));
    }
  }
}

void MomentumTeacherBase::set_master(size_t index, const std::string& name, const at::Tensor& value) {
  std::string key = "master/" + name;
  std::replace(key.begin(), key.end(), '.', '/');  // a buffer's name may have no dots
  if (named_buffers(/*recurse=*/false).contains(key)) {
    masters_[index].set_data(value);
  } else {
    masters_[index] = register_buffer(key, value);
  }
}

void MomentumTeacherBase::keep_precision_while(const std::function<void()>& cast) {
  torch::NoGradGuard no_grad;
  refresh_masters();
  const auto parameters = teacher_->named_parameters();
  // Tensors of their own over the memory from before the cast.
  std::vector<at::Tensor> precise;
  precise.reserve(masters_.size());
  for (size_t i = 0; i < masters_.size(); ++i) {
    precise.push_back((has_values(masters_[i]) ? masters_[i] : parameters[i].value()).detach());
  }
  const at::Tensor updates = updates_state_.detach();
  cast();
  updates_state_.set_data(updates.to(updates_state_.device()));
  for (size_t i = 0; i < masters_.size(); ++i) {
    at::Tensor parameter = parameters[i].value();
    if (needs_master(parameter)) {
      set_master(i, parameters[i].key(),
                 precise[i].to(parameter.device(), at::kFloat, /*non_blocking=*/false, /*copy=*/true));
      parameter.copy_(masters_[i]);  // its rounding in the new dtype, not the rounding of a rounding
    } else if (has_values(masters_[i])) {
      parameter.copy_(precise[i]);
      masters_[i].set_data(at::empty({0}, masters_[i].options().dtype(at::kFloat)));
    }
  }
}

void MomentumTeacherBase::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  keep_precision_while([&] { torch::nn::Module::to(device, dtype, non_blocking); });
}

void MomentumTeacherBase::to(torch::Dtype dtype, bool non_blocking) {
  keep_precision_while([&] { torch::nn::Module::to(dtype, non_blocking); });
}

void MomentumTeacherBase::to(torch::Device device, bool non_blocking) {
  keep_precision_while([&] { torch::nn::Module::to(device, non_blocking); });
}

int64_t MomentumTeacherBase::updates() const { return updates_state_.item<int64_t>(); }

double MomentumTeacherBase::param_momentum() const { return teacher_param_momentum(updates(), total_iters_, start_); }

void MomentumTeacherBase::set_param_momentum(double start) {
  check_param_momentum(start);
  start_ = start;
}

void MomentumTeacherBase::set_total_iters(int64_t total_iters) {
  momentum_bn::set_total_iters(*teacher_, total_iters);
  total_iters_ = total_iters;
}

void MomentumTeacherBase::reset() {
  torch::NoGradGuard no_grad;
  updates_state_.zero_();
  forwards_ = -1;
  for (auto* layer : layers_of(*teacher_)) {
    layer->restart_schedule();
  }
}

}  // namespace momentum_bn
