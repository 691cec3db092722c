#pragma once

#include "ops/shared/operator.h"

#include <tuple>

namespace momentum_bn::ops {

/// The teacher's parameters follow the student's: see update.cpp.
struct TeacherUpdate {
  static constexpr const char* kName = "momentum_bn::_teacher_update_";
  using Result = void;
  at::TensorList teacher;
  at::TensorList master;
  at::TensorList student;
  at::Tensor& updates;
  int64_t total_iters;
  double param_momentum;

  auto fields() const { return std::tie(teacher, master, student, updates, total_iters, param_momentum); }
};

}  // namespace momentum_bn::ops
