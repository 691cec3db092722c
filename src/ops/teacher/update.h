#pragma once

#include "ops/teacher/call.h"

#include <ATen/core/Tensor.h>

namespace momentum_bn::composite {

/// 1 - the teacher's param momentum, 0-d on the device of `updates`: at most 1 - param_momentum.
at::Tensor weight_of_student(const ops::TeacherUpdate& call);

/// Each parameter of the teacher, or its master where it has one, moves to the student's by weight_of_student.
void teacher_update_(const ops::TeacherUpdate& call);

}  // namespace momentum_bn::composite
