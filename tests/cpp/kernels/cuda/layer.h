#pragma once

#include "call_inputs.h"
#include "kernels/cuda/kernels.h"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

// Calls of the CUDA kernels, run by the emulator, and what they should give, from the layer's formulas in float64.

namespace momentum_bn::kernels::cuda::test {

/// Values of the state. An empty running_mean: the layer does not track.
struct LayerState {
  /// BatchNorm's: of the rest only running_mean, running_var and num_batches_tracked are there.
  bool is_batch_norm = false;
  std::vector<double> running_mean;
  std::vector<double> running_var;
  std::vector<double> view_mean_sum;
  std::vector<double> view_var_sum;
  int64_t num_batches_tracked = 0;
  int64_t view_count = 0;
  int64_t cur_iter = 0;
  double momentum = 1;
  bool momentum_is_float = false;

  bool tracks() const { return !running_mean.empty(); }
  /// As after some training, in the precision that `type` keeps it in.
  static LayerState used(Type type, int64_t channels);
  /// The same of BatchNorm.
  static LayerState used_batch_norm(Type type, int64_t channels);
};

struct ForwardCall : kernels::test::ForwardInputs {
  std::vector<double> weight = {};  // or empty
  std::vector<double> bias = {};    // or empty
  BlendOptions options = {1e-5, 100, 2, true, Variance::Published};
  /// (ranks, 2 * channels + 1), or empty
  std::vector<double> gathered = {};
  int64_t ranks = 0;
  /// Pure function, with this momentum.
  std::optional<double> functional_momentum = {};
  /// Of BatchNorm; none: a cumulative average.
  std::optional<double> update_momentum = {};
  /// All rows are saved.
  bool through_statistics = false;
};

struct ForwardResult {
  std::vector<double> y;
  std::vector<double> saved;
  std::vector<double> batch_mean;  // of the pure function
  std::vector<double> batch_var;
};

/// Expects what must hold for every call: no errors of the emulator, nothing written but the outputs, counters at 0.
ForwardResult run_forward(const ForwardCall& call, LayerState& state, const Device& device);

/// From the formulas.
ForwardResult expected_forward(const ForwardCall& call, LayerState& state);

/// (2 * channels + 1)
std::vector<double> run_statistics(const ForwardCall& call, const Device& device);
std::vector<double> expected_statistics(const Shape& shape, const std::vector<double>& x);

/// How the gradient of x is formed.
enum class Gradient {
  kConstantStatistics,
  kThroughStatistics,
  kThroughStatisticsInHalves,
};

struct BackwardCall : kernels::test::BackwardInputs {
  Gradient gradient = Gradient::kConstantStatistics;
  /// The mask is made from x, and must be that of y.
  bool mask_from_x = false;
  std::vector<double> weight = {};  // or empty
  std::vector<double> bias = {};    // or empty
  std::vector<double> saved = {};
  bool with_dbias = true;
};

std::string describe(const BackwardCall& call);

/// Empty: was not asked for.
struct BackwardResult {
  std::vector<double> dx;
  std::vector<double> dresidual;
  std::vector<double> dweight;
  std::vector<double> dbias;
  std::vector<double> sums;  // where they are formed in halves
};

BackwardResult run_backward(const BackwardCall& call, const Device& device);
BackwardResult expected_backward(const BackwardCall& call);

}  // namespace momentum_bn::kernels::cuda::test
