#pragma once

#include "kernels/channel_rules.h"
#include "kernels/shape.h"

#include <cstdint>

// This is the interface of the CPU kernels: they take pointers and sizes and write numbers, and know neither tensors
// nor dispatcher nor state. One source (kernels.cpp) is compiled once per instruction set; dispatch.cpp picks.
//
// Arrays [channels] are double for Type::kDouble, else float, unless they are declared double. A null pointer means
// that there is none.

namespace momentum_bn::kernels {

/// Runs body(context, begin, end) over parts of [0, tasks), possibly at the same time.
using Body = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t tasks, Body body, void* context);

/// A forward pass keeps its statistics for the backward pass in rows of [channels]. Row 0 is the mean that normalises,
/// rounded to about the spacing of the values; row 1 is what it lost to rounding; row 2 is 1 / sqrt(variance + eps).
constexpr int kSavedRows = 3;
/// There are more rows where gradients flow through the statistics. Row 3 is the mean that normalises less the batch's;
/// row 4 is m / n and row 5 is m * c / n, where m is the batch's weight in the blend, n the number of values per
/// channel, and c what the batch's biased variance is multiplied with before it normalises.
constexpr int kSavedRowsThroughStatistics = 6;

struct StatisticsArgs {
  Type type;
  Shape shape;
  const void* x;
  // Arrays [channels] that are written: the mean and the sum of squared deviations from it.
  double* mean;
  double* m2;
  ParallelFor parallel_for;
};

/// How batch statistics lead to what a channel is normalised with, and to the new state.
struct BlendArgs {
  double values_per_channel;  // n: the values that mean and m2 are of, those of all processes of a group
  BlendOptions options;
  /// The batch's weight in what normalises. With 1 it normalises alone, whatever the running statistics hold.
  double batch_weight;
  /// The weight of the batch, or of the mean of the views, in the update of the running statistics.
  double update_weight;
  double views;           // the number of views in the update, this one counted
  bool completes_update;  // where it is not set the running statistics stay as they are
  // Arrays [channels].
  void* running_mean;
  void* running_var;
  void* view_mean_sum;  // null where an update takes one batch
  void* view_var_sum;
  void* batch_mean;  // written: those of the batch, the variance unbiased
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
  /// y is large, is not x and was written before, so that it is better written past the caches.
  bool stream;
  // Arrays [channels].
  const void* weight;
  const void* bias;
  /// [saved_rows][channels]. forward() writes it, normalize() reads the first kSavedRows.
  void* saved;
  int saved_rows;  // kSavedRows or kSavedRowsThroughStatistics
  /// What forward() blends; normalize() ignores it.
  const BlendArgs* blend;
  /// Arrays [channels], both or none. Where statistics_given is set forward() normalises with these, which are as
  /// statistics() writes them; else it writes those of x.
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
  const void* x;  // may be null only in backward(), without dweight, where y is given or relu not set
  bool relu;
  /// Forward's output, which is read where relu is set. Where it is null its signs are made again from x, to the same
  /// bits; the forward pass must then have had no residual, and the weight and bias that are given here.
  const void* y;
  void* dx;         // may be dy
  void* dresidual;  // must not be dy
  /// dx and dresidual are large, are not dy and were written before, so that they are better written past the caches.
  bool stream;
  const void* saved;  // as forward() wrote it; kSavedRows are enough with constant statistics
  // Arrays [channels].
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
  /// Writes mean and m2 of x.
  void (*statistics)(const StatisticsArgs&);
  /// Forms the statistics, unless they are given, blends them, and writes y.
  void (*forward)(const ForwardArgs&);
  /// Writes y, with the statistics in `saved`.
  void (*normalize)(const ForwardArgs&);
  /// Takes the statistics for constants, and writes what is asked for in one pass.
  void (*backward)(const BackwardArgs&);
  /// Writes everything, dx through the statistics.
  void (*backward_through_statistics)(const BackwardArgs&);
  /// Does the first half of that: all but dx.
  void (*gradient_sums)(const BackwardArgs&);
  /// Does the second half: dx alone. Where there is a dresidual, gradient_sums() has written it, and it is read in the
  /// place of dy and y.
  void (*gradient_of_input)(const BackwardArgs&);
};

}  // namespace momentum_bn::kernels
