#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

// What is refused, in one place and in one set of words: the operators, the C++ modules and Python all come here.
// Every function throws before anything was changed: c10::ValueError, c10::TypeError for a dtype, and c10::Error where
// torch's own BatchNorm raises a RuntimeError.

namespace momentum_bn {

void check_num_features(int64_t num_features);
void check_eps(double eps);
void check_momentum(std::optional<double> momentum);
void check_total_iters(int64_t total_iters);
void check_views_per_update(int64_t views_per_update);
void check_cur_iter(int64_t cur_iter);
void check_param_momentum(double param_momentum);

/// x is a dense tensor of at least two dimensions, in float32, float64, bfloat16 or float16: what the kernels read. The
/// residual, if any, has its shape and dtype.
void check_input(const at::Tensor& x, const std::optional<at::Tensor>& residual);
/// `tensor` has the shape and dtype of `like` and is on its device.
void check_same(const at::Tensor& tensor, const char* name, const at::Tensor& like, const char* like_name);
/// The second dimension of x is num_features.
void check_channels(const at::Tensor& x, const c10::SymInt& num_features);
/// `parameter`, if defined, is (C) on x's device, and in float32 or x's dtype.
void check_parameter(const at::Tensor& x, const at::Tensor& parameter, const char* name);
/// `tensor` holds one value of one of these dtypes, and is on `device`.
void check_scalar(const at::Tensor& tensor, const char* name, std::initializer_list<at::ScalarType> dtypes,
                  c10::Device device);
/// cur_iter and momentum of a schedule.
void check_schedule(const at::Tensor& cur_iter, const at::Tensor& momentum);
/// A batch that normalises itself has more than one value per channel.
void check_batch_statistics(const at::Tensor& x);
/// The same for all processes of a group together, x being this one's batch.
void check_group_statistics(const at::Tensor& x, double values_per_channel);
/// One master (empty, or float32 in its parameter's shape) and one student parameter of the same shape for each of the
/// teacher's; updates is an int64 scalar.
void check_pairs(at::TensorList teacher, at::TensorList master, at::TensorList student, const at::Tensor& updates);
/// Recomputation inside a backward pass would update the state twice.
void check_not_recomputing();

}  // namespace momentum_bn
