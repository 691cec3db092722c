#pragma once

#include "kernels/shape.h"

#include <momentum_bn/variance.h>

#include <cstdint>

// The interface of the CPU kernels: pointers and sizes in, numbers out; no tensors, no dispatcher, no state.
// One source (kernels.cpp) is compiled once per instruction set; dispatch.cpp picks.
//
// Arrays [channels] are double for Type::kDouble, else float, unless they are declared double. A null pointer means
// that there is none.

namespace momentum_bn::kernels {

/// Runs body(context, begin, end) over parts of [0, tasks), possibly at the same time.
using Body = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t tasks, Body body, void* context);

/// What a forward pass keeps of its statistics for the backward pass: rows of [channels].
/// 0 the mean that normalises, rounded; 1 what it lost to rounding; 2 1 / sqrt(variance + eps).
constexpr int kSavedRows = 3;
/// The same where gradients flow through the statistics. 3 the mean that normalises less the batch's; 4 m / n;
/// 5 m * c / n: m is the batch's weight in the blend, n values per channel, c what the batch's biased variance is
/// multiplied with before it normalises.
constexpr int kSavedRowsThroughStatistics = 6;

struct StatisticsArgs {
  Type type;
  Shape shape;
  const void* x;
  // [channels], written: the mean and the sum of squared deviations from it.
  double* mean;
  double* m2;
  ParallelFor parallel_for;
};

/// From a channel's batch statistics to what it is normalised with, and to the state.
struct BlendArgs {
  double values_per_channel;  // n, of all that mean and m2 were taken over: of all processes of a group
  double eps;
  Variance variance;
  /// Of the batch in what normalises. With 1 it normalises alone, whatever the running statistics hold.
  double batch_weight;
  /// Of the batch, or of the mean of the views, in the update of the running statistics.
  double update_weight;
  double views;           // in the update, this one counted
  bool completes_update;  // else the running statistics stay as they are
  // [channels]
  void* running_mean;
  void* running_var;
  void* view_mean_sum;  // null: an update takes one batch
  void* view_var_sum;
  void* batch_mean;  // written: of the batch, the variance unbiased
  void* batch_var;
};

/// y = (x - mean) / sqrt(variance + eps) * weight + bias + residual, and max(0, y) where relu is set.
struct ForwardArgs {
  Type type;
  Shape shape;  // may be without values where the statistics are given
  const void* x;
  const void* residual;
  void* y;  // may be x, as may the residual
  bool relu;
  /// y is large, not x and was written before: better written past the caches.
  bool stream;
  // [channels]
  const void* weight;
  const void* bias;
  /// [saved_rows][channels]. forward() writes it, normalize() reads the first kSavedRows.
  void* saved;
  int saved_rows;  // kSavedRows or kSavedRowsThroughStatistics
  /// What forward() blends; normalize() ignores it.
  const BlendArgs* blend;
  /// [channels], both or none: where statistics_given is set what forward() normalises with, as statistics() writes
  /// them; else forward() writes those of x.
  double* mean;
  double* m2;
  bool statistics_given;
  ParallelFor parallel_for;
};

/// With g = dy, but 0 where relu is set and y <= 0, and xhat = (x - mean) / sqrt(variance + eps):
/// dweight = sum(g * xhat), dbias = sum(g), dresidual = g and, with constant statistics,
/// dx = g * weight / sqrt(variance + eps). Through the statistics, with the rows 4 and 5 of `saved`,
/// dx = (g - m / n * sum(g) - m * c / n * (x - batch mean) * sum(g * xhat) / sqrt(variance + eps))
///      * weight / sqrt(variance + eps).
struct BackwardArgs {
  Type type;
  Shape shape;  // may be without values in gradient_sums() and gradient_of_input()
  const void* dy;
  const void* x;  // null only in backward(), without dweight, where y is given or relu not set
  bool relu;
  /// Forward's output, read where relu is set. Null: its signs are made again from x, to the same bits, for which the
  /// forward pass must have had no residual, and the weight and bias given here.
  const void* y;
  void* dx;         // may be dy
  void* dresidual;  // not dy
  /// dx and dresidual are large, not dy and were written before: better written past the caches.
  bool stream;
  const void* saved;  // as forward() wrote it; all rows only where gradients flow through the statistics
  // [channels]
  const void* weight;
  const void* bias;  // read only where the signs of y are made from x
  void* dweight;     // written
  void* dbias;       // written
  /// [2][channels]: sum(g) and sum(g * (x - mean)). gradient_of_input() reads them, summed up over all processes of a
  /// group; the others write them where there is an array.
  double* sums;
  ParallelFor parallel_for;
};

struct KernelTable {
  /// mean and m2 of x.
  void (*statistics)(const StatisticsArgs&);
  /// Statistics, unless they are given, blend, y.
  void (*forward)(const ForwardArgs&);
  /// y with the statistics in `saved`.
  void (*normalize)(const ForwardArgs&);
  /// With constant statistics: everything, or what is asked for of it, in one pass.
  void (*backward)(const BackwardArgs&);
  /// Through the statistics: everything, dx among it.
  void (*backward_through_statistics)(const BackwardArgs&);
  /// Its first half: all but dx.
  void (*gradient_sums)(const BackwardArgs&);
  /// Its second half: dx alone. Where there is a dresidual, gradient_sums() has written it, and it is read in the place
  /// of dy and y.
  void (*gradient_of_input)(const BackwardArgs&);
};

}  // namespace momentum_bn::kernels
