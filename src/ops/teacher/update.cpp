// `_teacher_update_`: an exponential moving average of parameters. `master` has an empty tensor for each parameter that
// is averaged itself, and a float32 copy of each that has 16 bits, in which an average would stand still: there the
// copy is averaged, and the parameter is its rounding.

#include "ops/teacher/update.h"

#include "ops/normalise/options.h"
#include "ops/shared/kernel_tensors.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_foreach_lerp.h>
#include <momentum_bn/schedule.h>
#include <torch/library.h>

#include <cmath>

namespace momentum_bn {

void check_param_momentum(double param_momentum) {
  TORCH_CHECK_VALUE(param_momentum >= 0 && param_momentum <= 1, "param_momentum must be in [0, 1] (got ",
                    param_momentum, ")");
}

void check_pairs(at::TensorList teacher, at::TensorList master, at::TensorList student, const at::Tensor& updates) {
  TORCH_CHECK_VALUE(master.size() == teacher.size() && student.size() == teacher.size(), "expected ", teacher.size(),
                    " masters and student parameters, as many as the teacher has (got ", master.size(), " and ",
                    student.size(), ")");
  check_scalar(updates, "updates", {at::kLong}, teacher.empty() ? updates.device() : teacher[0].device());
  for (size_t i = 0; i < teacher.size(); ++i) {
    TORCH_CHECK_VALUE(student[i].sym_sizes() == teacher[i].sym_sizes(), "student[", i,
                      "] must have the shape of the teacher's parameter ", teacher[i].sym_sizes(), " (got ",
                      student[i].sym_sizes(), ")");
    const bool none = master[i].sym_numel() == 0;
    TORCH_CHECK_VALUE(none || master[i].sym_sizes() == teacher[i].sym_sizes(), "master[", i,
                      "] must be empty or have the shape of the teacher's parameter ", teacher[i].sym_sizes(), " (got ",
                      master[i].sym_sizes(), ")");
    TORCH_CHECK_TYPE(none || master[i].scalar_type() == at::kFloat, "master[", i, "] must be float32 (got ",
                     master[i].scalar_type(), ")");
    const auto dtype = teacher[i].scalar_type();
    TORCH_CHECK_TYPE(none || dtype == at::kHalf || dtype == at::kBFloat16, "teacher[", i,
                     "] must be float16 or bfloat16 where it has a master (got ", dtype, ")");
    for (const auto* tensor : {&master[i], &student[i]}) {
      TORCH_CHECK_VALUE((tensor->device() == teacher[i].device() && tensor->layout() == teacher[i].layout()) ||
                            (tensor == &master[i] && none),
                        tensor == &master[i] ? "master[" : "student[", i, "] must be on the teacher's device ",
                        teacher[i].device(), " and of its layout ", teacher[i].layout(), " (got ", tensor->device(),
                        " and ", tensor->layout(), ")");
    }
  }
}

namespace composite {

at::Tensor weight_of_student(const ops::TeacherUpdate& call) {
  check_total_iters(call.total_iters);
  check_param_momentum(call.param_momentum);
  const auto progress = call.updates.clamp_max(call.total_iters).to(blend_type(call.updates)) / call.total_iters;
  return ((progress * M_PI).cos() + 1) * (0.5 * (1 - call.param_momentum));
}

void teacher_update_(const ops::TeacherUpdate& call) {
  check_pairs(call.teacher, call.master, call.student, call.updates);
  const auto weight = weight_of_student(call);
  for (size_t i = 0; i < call.teacher.size(); ++i) {
    const bool has_master = call.master[i].numel() > 0;
    const auto& average = has_master ? call.master[i] : call.teacher[i];
    average.lerp_(call.student[i].to(average.scalar_type()), weight.to(average.options()));
    if (has_master) {
      call.teacher[i].copy_(average);
    }
  }
  call.updates.add_(1);
}

}  // namespace composite

namespace {

/// All parameters together, with the weight as a number.
void teacher_update_on_cpu(const ops::TeacherUpdate& call) {
  check_pairs(call.teacher, call.master, call.student, call.updates);
  const auto count = call.updates.item<int64_t>();
  const double weight = 1 - teacher_param_momentum(count, call.total_iters, call.param_momentum);
  std::vector<at::Tensor> averages;
  std::vector<at::Tensor> values;
  for (size_t i = 0; i < call.teacher.size(); ++i) {
    averages.push_back(call.master[i].numel() > 0 ? call.master[i] : call.teacher[i]);
    values.push_back(call.student[i].to(averages.back().scalar_type()));
  }
  if (!averages.empty()) {
    at::_foreach_lerp_(averages, values, weight);
  }
  for (size_t i = 0; i < call.teacher.size(); ++i) {
    if (!averages[i].is_same(call.teacher[i])) {
      call.teacher[i].copy_(averages[i]);
    }
  }
  call.updates.fill_(count + 1);
}

void teacher_update_on_meta(const ops::TeacherUpdate& call) {
  check_pairs(call.teacher, call.master, call.student, call.updates);
  check_total_iters(call.total_iters);
  check_param_momentum(call.param_momentum);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(momentum_bn, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag, at::Tag::flexible_layout};
  m.def(
      "_teacher_update_(Tensor(a!)[] teacher, Tensor(b!)[] master, Tensor[] student, Tensor(c!) updates, "
      "int total_iters, float param_momentum) -> ()",
      tags);
}
TORCH_LIBRARY_IMPL(momentum_bn, CPU, m) { ops::implement<teacher_update_on_cpu>(m); }
TORCH_LIBRARY_IMPL(momentum_bn, Meta, m) { ops::implement<teacher_update_on_meta>(m); }
TORCH_LIBRARY_IMPL(momentum_bn, CompositeExplicitAutograd, m) { ops::implement<composite::teacher_update_>(m); }
TORCH_LIBRARY_IMPL(momentum_bn, Autograd, m) {
  m.impl(ops::TeacherUpdate::kName, torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(momentum_bn, ADInplaceOrView, m) { ops::implement<ops::with_version_bumps<ops::TeacherUpdate>>(m); }

}  // namespace momentum_bn
