#include <momentum_bn/teacher.h>

#include "ops/shared/checks.h"
#include "ops/teacher/call.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace momentum_bn {
namespace {

bool needs_master(const at::Tensor& parameter) { return at::isReducedFloatingType(parameter.scalar_type()); }

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
  set_total_iters(*teacher_, total_iters);
  updates_state_ = register_buffer("updates", at::zeros({}, at::kLong));
  const auto parameters = teacher_->named_parameters();
  for (const auto& [name, source] : pairs) {
    at::Tensor target = parameters[name];
    target.set_requires_grad(false);
    target.copy_(source);
    auto master = at::empty({0}, target.options().dtype(at::kFloat));
    if (needs_master(target)) {
      std::string key = "master/" + name;
      std::replace(key.begin(), key.end(), '.', '/');  // a buffer's name may have no dots
      master = register_buffer(key, source.detach().to(at::kFloat, /*non_blocking=*/false, /*copy=*/true));
    }
    masters_.push_back(master);
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
  for (const auto& pair : paired_with(student)) sources.push_back(pair.second.detach());
  ops::call(ops::TeacherUpdate{targets, masters_, sources, updates_state_, total_iters_, start_});
}

int64_t MomentumTeacherBase::updates() const { return updates_state_.item<int64_t>(); }

double MomentumTeacherBase::param_momentum() const { return teacher_param_momentum(updates(), total_iters_, start_); }

}  // namespace momentum_bn
