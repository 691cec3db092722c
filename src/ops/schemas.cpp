// The schemas of all operators. They are private (leading underscore): exported programs promise nothing about them.
//
// `state` is either empty (a layer that does not track) or, in this order,
// running_mean, running_var, num_batches_tracked, view_mean_sum, view_var_sum, view_count, cur_iter, momentum.
// `saved` is what the backward pass needs of the statistics: (3, C), float64 for float64 input, else float32; its rows
// are the mean, what the mean lost when it was rounded to that dtype, and 1 / std.
//
// `_batch_statistics` returns (2C + 1): the means of x, the sums of squared deviations from them, and the number of
// values per channel; float64 where the device has it. `_group_statistics`: (ranks, 2C + 1), those of all processes of
// a c10d group. A training forward in a group is given its name as `process_group`, and gathers them itself, in one
// collective. Or it is given them, as `group_statistics`, where a graph is made: gathered by torch's own operator,
// which a compiler knows for a collective and never moves past another.

#include <torch/library.h>

TORCH_LIBRARY(momentum_bn, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag, at::Tag::flexible_layout};

  m.def(
      "_check_options(int num_features, float eps, float? momentum, int total_iters, int views_per_update, "
      "str schedule, str variance, str? activation) -> ()");
  m.def("_check_input(Tensor x, Tensor? residual, int num_features) -> ()", tags);
  m.def("_check_parameters(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var) -> ()",
        tags);
  m.def("_check_process_group(str name) -> ()");
  m.def("_scheduled_momentum(int cur_iter, int total_iters) -> float");
  m.def("_teacher_param_momentum(int updates, int total_iters, float start) -> float");
  m.def("_show_config() -> str");
  m.def("_kept_memory() -> int");
  m.def("_kept_memory_limit() -> int");
  m.def("_set_kept_memory_limit(int bytes) -> ()");
  m.def("_release_kept_memory() -> ()");

  m.def("_batch_statistics(Tensor x) -> Tensor", tags);
  m.def("_group_statistics(Tensor x, str process_group) -> Tensor", tags);
  m.def(
      "_forward_train(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)[] state, float eps, "
      "int total_iters, int views_per_update, str schedule, str variance, str? activation, str? process_group=None, "
      "Tensor? group_statistics=None) -> (Tensor y, Tensor saved)",
      tags);
  m.def(
      "_forward_train_(Tensor(a!) x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(b!)[] state, float eps, "
      "int total_iters, int views_per_update, str schedule, str variance, str? activation, str? process_group=None, "
      "Tensor? group_statistics=None) -> Tensor saved",
      tags);
  m.def(
      "_forward_eval_(Tensor(a!) x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor running_mean, "
      "Tensor running_var, float eps, str? activation) -> ()",
      tags);
  m.def(
      "_forward_functional(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
      "float momentum, float eps, str variance) -> (Tensor y, Tensor b_mean, Tensor b_var, Tensor saved)",
      tags);
  m.def(
      "_backward(Tensor dy, Tensor? x, Tensor? y, Tensor? weight, Tensor saved, str? activation, bool[4] output_mask) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
      tags);

  // dx takes the place of dy, whatever output_mask says of it.
  m.def(
      "_backward_(Tensor(a!) dy, Tensor? x, Tensor? y, Tensor? weight, Tensor saved, str? activation, "
      "bool[4] output_mask) -> (Tensor dweight, Tensor dbias, Tensor dresidual)",
      tags);

  m.def("_advance_schedule_(Tensor(a!) cur_iter, Tensor(b!) momentum, int total_iters, str schedule) -> ()", tags);
  m.def(
      "_teacher_update_(Tensor(a!)[] teacher, Tensor(b!)[] master, Tensor[] student, Tensor(c!) updates, "
      "int total_iters, float param_momentum) -> ()",
      tags);
}
