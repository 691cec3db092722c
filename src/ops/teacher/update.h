#pragma once

#include "ops/teacher/call.h"

#include <ATen/core/Tensor.h>

namespace momentum_bn {

/// @throws c10::ValueError outside [0, 1]
void check_param_momentum(double param_momentum);
/// One master (empty, or float32 in its parameter's shape) and one student parameter of the same shape for each of the
/// teacher's; updates is an int64 scalar. @throws c10::ValueError, c10::TypeError
void check_pairs(at::TensorList teacher, at::TensorList master, at::TensorList student, const at::Tensor& updates);

namespace composite {

/// 1 - the teacher's param momentum, 0-d on the device of `updates`: at most 1 - param_momentum.
at::Tensor weight_of_student(const ops::TeacherUpdate& call);

/// Each parameter of the teacher, or its master where it has one, moves to the student's by weight_of_student.
void teacher_update_(const ops::TeacherUpdate& call);

}  // namespace composite
}  // namespace momentum_bn
