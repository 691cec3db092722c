#pragma once

#include "ops/normalise/options.h"
#include "ops/shared/operator.h"

#include <array>
#include <optional>
#include <tuple>

// These are the operators of the layers, each as the struct of its arguments: ops/shared/operator.h tells how such a
// struct is called and implemented. schemas.cpp has their schemas, and says what `state` and `saved` are. A comment
// above a struct tells what its operator returns, in order, where the name does not.

namespace momentum_bn::ops {

struct BatchStatistics {
  static constexpr const char* kName = "momentum_bn::_batch_statistics";
  using Result = at::Tensor;
  const at::Tensor& x;

  auto fields() const { return std::tie(x); }
};

struct GroupStatistics {
  static constexpr const char* kName = "momentum_bn::_group_statistics";
  using Result = at::Tensor;
  const at::Tensor& x;
  Word process_group;

  auto fields() const { return std::tie(x, process_group); }
};

/// The arguments that a training forward has both into fresh memory and in place.
/// @tparam X  const at::Tensor&, or at::Tensor& where x is overwritten
template <typename X>
struct TrainArguments {
  X x;
  const MaybeTensor& residual;
  const MaybeTensor& weight;
  const MaybeTensor& bias;
  at::TensorList state;
  Options options;
  MaybeWord process_group;
  const MaybeTensor& group_statistics;

  auto fields() const {
    return std::tuple_cat(std::tie(x, residual, weight, bias, state), options.fields(),
                          std::tie(process_group, group_statistics));
  }
};

/// y and saved.
struct ForwardTrain : TrainArguments<const at::Tensor&> {
  static constexpr const char* kName = "momentum_bn::_forward_train";
  using Result = std::tuple<at::Tensor, at::Tensor>;
};

/// saved; x then holds y.
struct ForwardTrainInplace : TrainArguments<at::Tensor&> {
  static constexpr const char* kName = "momentum_bn::_forward_train_";
  using Result = at::Tensor;
};

struct ForwardEvalInplace {
  static constexpr const char* kName = "momentum_bn::_forward_eval_";
  using Result = void;
  at::Tensor& x;
  const MaybeTensor& residual;
  const MaybeTensor& weight;
  const MaybeTensor& bias;
  const at::Tensor& running_mean;
  const at::Tensor& running_var;
  double eps;
  MaybeWord activation;

  auto fields() const { return std::tie(x, residual, weight, bias, running_mean, running_var, eps, activation); }
};

/// y, b_mean, b_var, saved.
struct ForwardFunctional {
  static constexpr const char* kName = "momentum_bn::_forward_functional";
  using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
  const at::Tensor& x;
  const MaybeTensor& weight;
  const MaybeTensor& bias;
  const MaybeTensor& running_mean;
  const MaybeTensor& running_var;
  double momentum;
  double eps;
  Word variance;

  auto fields() const { return std::tie(x, weight, bias, running_mean, running_var, momentum, eps, variance); }
};

/// Which of the gradients dx, dweight, dbias and dresidual are asked for, in this order.
using OutputMask = std::array<bool, 4>;

/// The arguments that a backward pass has both into fresh memory and in place.
/// @tparam Dy  const at::Tensor&, or at::Tensor& where dy is overwritten
template <typename Dy>
struct BackwardArguments {
  Dy dy;
  const MaybeTensor& x;
  const MaybeTensor& y;
  const MaybeTensor& weight;
  const MaybeTensor& bias;
  const at::Tensor& saved;
  MaybeWord activation;
  OutputMask output_mask;

  auto fields() const { return std::tie(dy, x, y, weight, bias, saved, activation, output_mask); }
};

/// dx, dweight, dbias, dresidual.
struct Backward : BackwardArguments<const at::Tensor&> {
  static constexpr const char* kName = "momentum_bn::_backward";
  using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
};

/// dweight, dbias, dresidual; dy then holds dx.
struct BackwardInplace : BackwardArguments<at::Tensor&> {
  static constexpr const char* kName = "momentum_bn::_backward_";
  using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
};

// The two halves of a backward pass through the statistics of a group: its ranks' sums are added between them.

/// sums, dweight, dbias, dresidual.
struct GradientSums : BackwardArguments<const at::Tensor&> {
  static constexpr const char* kName = "momentum_bn::_gradient_sums";
  using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
};

/// dx.
struct GradientOfInput {
  static constexpr const char* kName = "momentum_bn::_gradient_of_input";
  using Result = at::Tensor;
  const at::Tensor& dy;
  const at::Tensor& x;
  const MaybeTensor& y;
  const MaybeTensor& weight;
  const MaybeTensor& bias;
  const at::Tensor& saved;
  const at::Tensor& sums;
  MaybeWord activation;

  auto fields() const { return std::tie(dy, x, y, weight, bias, saved, sums, activation); }
};

struct CheckOptions {
  static constexpr const char* kName = "momentum_bn::_check_options";
  using Result = void;
  int64_t num_features;
  Options options;

  auto fields() const { return std::tuple_cat(std::tie(num_features), options.fields()); }
};

struct AdvanceSchedule {
  static constexpr const char* kName = "momentum_bn::_advance_schedule_";
  using Result = void;
  at::Tensor& cur_iter;
  at::Tensor& momentum;
  int64_t total_iters;
  Word schedule;

  auto fields() const { return std::tie(cur_iter, momentum, total_iters, schedule); }
};

}  // namespace momentum_bn::ops
