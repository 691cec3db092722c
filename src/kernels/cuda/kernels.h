#pragma once

#include "kernels/channel_rules.h"
#include "kernels/shape.h"

#include <cstddef>
#include <cstdint>

// The interface of the CUDA kernels: device pointers, sizes and a stream in, launches out; no tensors, no dispatcher.
// Nothing here waits for the device, and everything can be captured in a CUDA graph.
// Every function returns 0, or the cudaError_t that the runtime gave.

namespace momentum_bn::kernels::cuda {

/// A cudaStream_t.
using Stream = void*;

/// What launches are computed from.
struct Device {
  int multiprocessors;
  int capability;  // 10 * major + minor; of what the kernels were compiled for, where that is less
  int threads_per_multiprocessor;
  int64_t shared_memory_per_block;  // that a kernel may ask for, opt-in
  int64_t shared_memory_per_multiprocessor;
  int64_t l2_bytes;
};

/// Gives the properties of the current device, which are asked for once per device and remembered.
int current_device(Device& device);

/// The state of a layer that tracks, on the device: see `state` in ops/normalise/schemas.cpp. Arrays are [channels],
/// double for Type::kDouble, else float.
struct State {
  void* running_mean;
  void* running_var;
  int64_t* num_batches_tracked;
  // Of Momentum BatchNorm alone: null for BatchNorm.
  void* view_mean_sum;
  void* view_var_sum;
  int64_t* view_count;
  int64_t* cur_iter;
  void* momentum;  // double, or float where momentum_is_float; negative: cumulative average
  bool momentum_is_float;
};

/// y = max(0, (x - center) * scale + shift + residual), the maximum only where relu is set.
struct ForwardArgs {
  Type type;
  Shape shape;  // of at least one value, but with `gathered`, where it may have none
  const void* x;
  const void* residual;  // or null
  void* y;               // may be x; may be residual
  bool relu;
  const void* weight;  // [channels], or null; double for Type::kDouble, else float
  const void* bias;    // the same
  void* saved;  // [3 or 6][channels], written: as in ops/normalise/schemas.cpp; double for Type::kDouble, else float
  bool through_statistics;  // all 6 rows of it are written, for a backward pass through the statistics
  BlendOptions options;
  bool tracks;  // else the batch alone normalises, and `state` is not read
  State state;
  /// Statistics of all ranks of a group, (ranks, 2 * channels + 1) doubles on the device as `_batch_statistics` has
  /// them, merged in the ranks' order; null: those of x. Where the ranks have no value at all, the state stays as it is
  /// and saved is filled with zeros.
  const double* gathered;
  int64_t ranks;
  /// Pure function: where not null, only running_mean and running_var of the state are read (`tracks`: whether they are
  /// there), none of it is written, and the batch's mean and unbiased variance go here.
  void* batch_mean;
  void* batch_var;
  /// Where the state holds no momentum. Pure function: of the batch in the blend. BatchNorm: of the batch in the
  /// update, negative for a cumulative average; in the blend it has weight 1.
  double momentum;
  void* workspace;  // forward_workspace_bytes() bytes, aligned to 256
  /// kCounters ints, 0 before and after every launch; not shared by launches that may run at the same time.
  unsigned* counters;
  Stream stream;
};

constexpr int64_t kCounters = 4096;

/// Statistics of x, blend, state, y.
int forward(const ForwardArgs& args, const Device& device);
size_t forward_workspace_bytes(Type type, const Shape& shape, const Device& device);

struct StatisticsArgs {
  Type type;
  Shape shape;
  const void* x;
  double* statistics;  // (2 * channels + 1), as `_batch_statistics` has them
  void* workspace;     // as for forward()
  unsigned* counters;
  Stream stream;
};

int statistics(const StatisticsArgs& args, const Device& device);

/// With g = dy, but 0 where relu is set and y <= 0, and xhat = (x - mean) / sqrt(variance + eps):
/// dweight = sum(g * xhat), dbias = sum(g), dresidual = g and, with constant statistics,
/// dx = g * weight / sqrt(variance + eps); for dx through the statistics see channel_rules.h. The same bits in every
/// run.
struct BackwardArgs {
  Type type;
  Shape shape;
  const void* dy;
  const void* x;  // or null, with constant statistics: no dweight, and no mask from x
  bool relu;
  /// Read where relu is set. Null: its signs are made again from x, to the same bits, for which the forward pass must
  /// have had no residual, and weight and bias are read.
  const void* y;
  const void* weight;  // [channels], or null; double for Type::kDouble, else float
  const void* bias;    // the same
  const void* saved;   // as forward() wrote it; all rows are read only for dx through the statistics
  bool through_statistics;
  void* dx;         // or null; may be dy
  void* dresidual;  // or null; not dy
  void* dweight;    // [channels], or null; double for Type::kDouble, else float
  void* dbias;      // the same
  /// [2][channels]: sum(g) and sum(g * (x - mean)). gradient_of_input() reads them; the others write them, or null.
  double* sums;
  void* workspace;     // backward_workspace_bytes() bytes, aligned to 256
  unsigned* counters;  // as for forward()
  Stream stream;
};

/// Writes everything. Through the statistics x is given.
int backward(const BackwardArgs& args, const Device& device);
/// Writes all but dx, which is null.
int gradient_sums(const BackwardArgs& args, const Device& device);
/// Writes dx alone, through the statistics, with these sums: those of all processes of a group.
int gradient_of_input(const BackwardArgs& args, const Device& device);
size_t backward_workspace_bytes(Type type, const Shape& shape, const Device& device);

/// The ways that forward() and backward() through the statistics may go.
enum class Paths {
  kBest,
  kOnChip,  // one launch, or cudaErrorNotSupported
  kSeveralLaunches,
};

/// Sets which ways calls of this process may go from now on. For tests.
void use_paths(Paths paths);

/// How many calls went each way so far.
struct PathCounts {
  int64_t on_chip;
  int64_t several_launches;
};
PathCounts path_counts();

/// cur_iter += 1 and, where `cosine` is set and the momentum is not negative, the momentum that belongs to it.
int advance_schedule(int64_t* cur_iter, void* momentum, bool momentum_is_float, int64_t total_iters, bool cosine,
                     Stream stream);

}  // namespace momentum_bn::kernels::cuda
