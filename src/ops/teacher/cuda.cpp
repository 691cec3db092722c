// `_teacher_update_` on CUDA: a few launches for all parameters together.

#include "ops/teacher/update.h"

#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_sub.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

namespace momentum_bn::cuda {
namespace {

/// The student's parameters, each in the dtype of the average that it enters.
std::vector<at::Tensor> cast_like(at::TensorList student, at::TensorList averages) {
  std::vector<at::Tensor> values;
  std::vector<at::Tensor> copies;
  std::vector<at::Tensor> sources;
  for (size_t i = 0; i < student.size(); ++i) {
    if (student[i].scalar_type() == averages[i].scalar_type()) {
      values.push_back(student[i]);
      continue;
    }
    values.push_back(at::empty_like(averages[i]));
    copies.push_back(values.back());
    sources.push_back(student[i]);
  }
  if (!copies.empty()) {
    at::_foreach_copy_(copies, sources);
  }
  return values;
}

void teacher_update_(const ops::TeacherUpdate& call) {
  check_pairs(call.teacher, call.master, call.student, call.updates);
  // torch has no foreach lerp whose weight is one number on the device. Below one half lerp is average + weight *
  // (value - average), a few launches for all parameters together; above, its formula is another.
  if (call.teacher.empty() || !(call.param_momentum > 0.5)) {
    composite::teacher_update_(call);
    return;
  }
  const auto weight = composite::weight_of_student(call);
  std::vector<at::Tensor> averages;
  std::vector<at::Tensor> rounded;
  std::vector<at::Tensor> masters;
  for (size_t i = 0; i < call.teacher.size(); ++i) {
    const bool has_master = call.master[i].numel() > 0;
    averages.push_back(has_master ? call.master[i] : call.teacher[i]);
    if (!has_master) {
      continue;
    }
    rounded.push_back(call.teacher[i]);
    masters.push_back(call.master[i]);
  }
  auto differences = at::_foreach_sub(cast_like(call.student, averages), averages);
  at::_foreach_mul_(differences, weight.to(averages[0].scalar_type()));
  at::_foreach_add_(averages, differences);
  if (!rounded.empty()) {
    at::_foreach_copy_(rounded, masters);
  }
  call.updates.add_(1);
}

}  // namespace

TORCH_LIBRARY_IMPL(momentum_bn, CUDA, m) { ops::implement<teacher_update_>(m); }

}  // namespace momentum_bn::cuda
