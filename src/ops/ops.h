#pragma once

#include "ops/config.h"
#include "ops/state.h"

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

// The operators, called through the dispatcher. Their schemas, and the meaning of `state` and `saved`, are in
// schemas.cpp.

namespace momentum_bn::ops {

using MaybeTensor = std::optional<at::Tensor>;
using Word = std::string_view;
using MaybeWord = std::optional<std::string_view>;

inline MaybeWord word_of(const std::optional<std::string>& owned) { return owned ? MaybeWord(*owned) : std::nullopt; }

using BatchStatistics = at::Tensor(const at::Tensor& x);
using GroupStatistics = at::Tensor(const at::Tensor& x, Word process_group);
using ForwardTrain = std::tuple<at::Tensor, at::Tensor>(const at::Tensor& x, const MaybeTensor& residual,
                                                        const MaybeTensor& weight, const MaybeTensor& bias,
                                                        at::TensorList state, double eps, int64_t total_iters,
                                                        int64_t views_per_update, Word schedule, Word variance,
                                                        MaybeWord activation, MaybeWord process_group,
                                                        const MaybeTensor& group_statistics);
using ForwardTrainInplace = at::Tensor(at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight,
                                       const MaybeTensor& bias, at::TensorList state, double eps, int64_t total_iters,
                                       int64_t views_per_update, Word schedule, Word variance, MaybeWord activation,
                                       MaybeWord process_group, const MaybeTensor& group_statistics);
using ForwardEvalInplace = void(at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight,
                                const MaybeTensor& bias, const at::Tensor& running_mean, const at::Tensor& running_var,
                                double eps, MaybeWord activation);
using ForwardFunctional = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& running_mean,
    const MaybeTensor& running_var, double momentum, double eps, Word variance);
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor& dy, const MaybeTensor& x, const MaybeTensor& y, const MaybeTensor& weight,
    const at::Tensor& saved, MaybeWord activation, std::array<bool, 4> output_mask);
using BackwardInplace = std::tuple<at::Tensor, at::Tensor, at::Tensor>(at::Tensor& dy, const MaybeTensor& x,
                                                                       const MaybeTensor& y, const MaybeTensor& weight,
                                                                       const at::Tensor& saved, MaybeWord activation,
                                                                       std::array<bool, 4> output_mask);
using AdvanceSchedule = void(at::Tensor& cur_iter, at::Tensor& momentum, int64_t total_iters, Word schedule);
using TeacherUpdate = void(at::TensorList teacher, at::TensorList master, at::TensorList student, at::Tensor& updates,
                           int64_t total_iters, double param_momentum);

BatchStatistics batch_statistics;
GroupStatistics group_statistics;
ForwardTrain forward_train;
ForwardTrainInplace forward_train_;
ForwardEvalInplace forward_eval_;
ForwardFunctional forward_functional;
Backward backward;
BackwardInplace backward_;
AdvanceSchedule advance_schedule_;
TeacherUpdate teacher_update_;

}  // namespace momentum_bn::ops
