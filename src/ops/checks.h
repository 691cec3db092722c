#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

// What is refused, in one place and in one set of words: the operators, the C++ modules and Python all come here.
// Every function throws before anything was changed: c10::ValueError, c10::TypeError for a dtype, and c10::Error where
// torch's own BatchNorm raises a RuntimeError.

namespace momentum_bn {

void check_eps(double eps);
void check_momentum(std::optional<double> momentum);
void check_total_iters(int64_t total_iters);
void check_views_per_update(int64_t views_per_update);
void check_cur_iter(int64_t cur_iter);
void check_param_momentum(double param_momentum);

/// x is a floating-point tensor of at least two dimensions; the residual, if any, has its shape and dtype.
void check_input(const at::Tensor& x, const std::optional<at::Tensor>& residual);
/// The second dimension of x is num_features.
void check_channels(const at::Tensor& x, int64_t num_features);
/// `parameter`, if defined, is (C) on x's device, and in float32 or x's dtype.
void check_parameter(const at::Tensor& x, const at::Tensor& parameter, const char* name);
/// A batch that normalises itself has more than one value per channel.
void check_batch_statistics(const at::Tensor& x);
/// The same for all processes of a group together, x being this one's batch.
void check_group_statistics(const at::Tensor& x, double values_per_channel);
/// One master and one student parameter for each of the teacher's.
void check_pairs(at::TensorList teacher, at::TensorList master, at::TensorList student);
/// Recomputation inside a backward pass would update the state twice.
void check_not_recomputing();

}  // namespace momentum_bn
