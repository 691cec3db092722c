// The schemas of the operators that normalise. Operators are private, as their leading underscore says: they may change
// from version to version, also under exported programs that contain them.
//
// `state` is one of, in this order:
// - nothing: a layer that does not track running statistics, and normalises by the batch alone;
// - running_mean, running_var, num_batches_tracked: BatchNorm. The batch normalises itself alone, and enters the
//   running statistics with the weight `momentum` (None: a cumulative average);
// - these and view_mean_sum, view_var_sum, view_count, cur_iter, momentum: Momentum BatchNorm, whose weight of the
//   batch, in the blend and in the update, is the last of them.
//
// `saved` is what the backward pass needs of the statistics, float64 for float64 input, else float32. Its rows are the
// mean that normalised, what that mean lost when it was rounded, and 1 / std. Where the statistics take gradients
// (`detach_statistics` false) three more rows follow: the mean that normalised less the batch's, m / n and m * c / n,
// where m is the weight of the batch in the blend, n the number of values per channel and c what the biased variance of
// the batch was multiplied with. The number of rows, 3 or 6, tells a backward pass which of the two it is.
//
// The mask of the activation is taken from y; where there is no y, it is made again from x, weight and bias.
//
// `_batch_statistics` returns (2C + 1): the means of x, the sums of squared deviations from them, and the number of
// values per channel; float64 where the device has it. `_group_statistics`: (ranks, 2C + 1), those of all processes of
// a c10d group. A training forward in a group is given its name as `process_group`, and gathers them itself, in one
// collective. Where a graph is made it is given them, as `group_statistics`: they were gathered by torch's own
// operator, which a compiler knows for a collective and never moves past another. `process_group` beside them is then
// the group over which the backward pass adds up, where the statistics take gradients.
//
// `_gradient_sums` and `_gradient_of_input` are the two halves of `_backward` through the statistics of a group,
// between which the ranks' `sums` are added up: (2, C), the sums of g and of g * (x - mean), where g is dy behind the
// activation's mask. float64 where the device has it.

#include "ops/normalise/options.h"

#include <torch/library.h>

#include <string>

namespace momentum_bn {

TORCH_LIBRARY(momentum_bn, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag, at::Tag::flexible_layout};
  const auto define = [&](const std::string& schema) { m.def(schema.c_str(), tags); };

  const std::string options = ops::kOptionsSchema;
  const std::string train = "Tensor? residual, Tensor? weight, Tensor? bias, Tensor(b!)[] state, " + options +
                            ", str? process_group=None, Tensor? group_statistics=None";
  define("_forward_train(Tensor x, " + train + ") -> (Tensor y, Tensor saved)");
  define("_forward_train_(Tensor(a!) x, " + train + ") -> Tensor saved");
  define(
      "_forward_eval_(Tensor(a!) x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor running_mean, "
      "Tensor running_var, float eps, str? activation) -> ()");
  define(
      "_forward_functional(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
      "float momentum, float eps, str variance) -> (Tensor y, Tensor b_mean, Tensor b_var, Tensor saved)");

  const std::string backward =
      "Tensor? x, Tensor? y, Tensor? weight, Tensor? bias, Tensor saved, str? activation, bool[4] output_mask";
  define("_backward(Tensor dy, " + backward + ") -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)");
  // dx takes the place of dy, whatever output_mask says of it.
  define("_backward_(Tensor(a!) dy, " + backward + ") -> (Tensor dweight, Tensor dbias, Tensor dresidual)");
  define("_gradient_sums(Tensor dy, " + backward +
         ") -> (Tensor sums, Tensor dweight, Tensor dbias, Tensor dresidual)");
  define(
      "_gradient_of_input(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor saved, Tensor sums, "
      "str? activation) -> Tensor dx");

  define("_check_options(int num_features, " + options + ") -> ()");
  define("_batch_statistics(Tensor x) -> Tensor");
  define("_group_statistics(Tensor x, str process_group) -> Tensor");
  define("_advance_schedule_(Tensor(a!) cur_iter, Tensor(b!) momentum, int total_iters, str schedule) -> ()");
}

}  // namespace momentum_bn
