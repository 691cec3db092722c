#pragma once

#include "kernels/shape.h"

#include <cstdint>

// The interface of the CPU kernels: pointers and sizes in, numbers out; no tensors, no dispatcher, no state.
// One source (kernels.cpp) is compiled once per instruction set; dispatch.cpp picks.

namespace momentum_bn::kernels {

/// Runs body(context, begin, end) over parts of [0, tasks), possibly at the same time.
using Body = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t tasks, Body body, void* context);

/// Called exactly once for each channel, possibly by several threads at once for different ranges of channels, when
/// their mean and m2 are known; fills their center, scale and shift.
using Blend = void (*)(void* context, int64_t channel_begin, int64_t channel_end);

/// Arrays of channels that the kernels read as full vectors must be readable this many elements beyond their end.
constexpr int64_t kPadding = 64;

/// y = max(0, (x - center) * scale + shift + residual), the maximum only where relu is set.
struct ForwardArgs {
  Type type;
  Shape shape;
  const void* x;
  const void* residual;  // or null
  void* y;               // may be x
  bool relu;
  /// y is large, not x and was written before: better written past the caches.
  bool stream;
  // [channels] plus kPadding, double for Type::kDouble, else float.
  void* center;
  void* scale;
  void* shift;
  // [channels]; what the statistics pass writes: the mean and the sum of squared deviations from it.
  double* mean;
  double* m2;
  Blend blend;
  void* blend_context;
  ParallelFor parallel_for;
};

/// With g = dy, or if y is given dy but 0 where y <= 0: dx = g * scale, dresidual = g, sum_g = sum(g), sum_gx = sum(g *
/// (x - center)).
struct BackwardArgs {
  Type type;
  Shape shape;
  const void* dy;
  const void* x;    // or null: no sum_gx
  const void* y;    // or null: no mask
  void* dx;         // or null; may be dy
  void* dresidual;  // or null
  /// dx and dresidual are large, not dy and were written before: better written past the caches.
  bool stream;
  // [channels] plus kPadding, double for Type::kDouble, else float.
  const void* scale;
  const void* center;
  // [channels]
  double* sum_g;
  double* sum_gx;
  ParallelFor parallel_for;
};

/// From a channel's batch statistics to center, scale and shift, and to the state. Arrays are [channels], double for
/// Type::kDouble, else float, but for mean and m2; a null pointer: there is none.
struct BlendArgs {
  Type type;
  int64_t channels;
  double values_per_channel;
  double eps;
  double momentum;            // weight of the batch
  double normalising_factor;  // of the unbiased variance that the batch is normalised with
  double running_factor;      // of the unbiased variance that goes into running_var
  double views;               // in the update, this one counted
  bool completes_update;      // else mean and variance are only remembered
  const double* mean;
  const double* m2;
  const void* weight;
  const void* bias;
  void* running_mean;  // read only where view_mean_sum is null
  void* running_var;
  void* view_mean_sum;
  void* view_var_sum;
  void* batch_mean;  // written: of the batch, the variance unbiased
  void* batch_var;
  void* center;
  void* scale;
  void* shift;
  void* saved;  // [3][channels]: center, what it lost to rounding, 1 / deviation
};

struct KernelTable {
  /// Statistics, blend, normalise.
  void (*forward)(const ForwardArgs&);
  /// Normalise with the center, scale and shift given.
  void (*normalize)(const ForwardArgs&);
  /// mean and m2 alone, of x: nothing else is read or written, nor blended.
  void (*statistics)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
  /// For channels [begin, end).
  void (*blend)(const BlendArgs&, int64_t begin, int64_t end);
};

}  // namespace momentum_bn::kernels
