// Operators that compute no tensor: checks, formulas on numbers, and what was built.

#include "ops/normalise/checks.h"
#include "ops/normalise/config.h"
#include "ops/shared/checks.h"
#include "ops/shared/group.h"

#include <momentum_bn/memory.h>
#include <momentum_bn/schedule.h>
#include <momentum_bn/show_config.h>
#include <torch/library.h>

namespace momentum_bn {
namespace {

void check_options(int64_t num_features, double eps, std::optional<double> momentum, int64_t total_iters,
                   int64_t views_per_update, ops::Word schedule, ops::Word variance, ops::MaybeWord activation) {
  check_num_features(num_features);
  check_eps(eps);
  check_momentum(momentum);
  check_total_iters(total_iters);
  check_views_per_update(views_per_update);
  schedule_of(schedule);
  variance_of(variance);
  activation_of(activation);
}

void check_input_of_layer(const at::Tensor& x, const ops::MaybeTensor& residual, int64_t num_features) {
  check_input(x, residual);
  check_channels(x, num_features);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(momentum_bn, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag, at::Tag::flexible_layout};
  m.def("_check_input(Tensor x, Tensor? residual, int num_features) -> ()", tags);
  m.def("_check_parameters(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var) -> ()",
        tags);
  m.def(
      "_check_options(int num_features, float eps, float? momentum, int total_iters, int views_per_update, "
      "str schedule, str variance, str? activation) -> ()",
      check_options);
  m.def("_check_process_group(str name) -> ()", check_process_group);
  m.def("_scheduled_momentum(int cur_iter, int total_iters) -> float", scheduled_momentum);
  m.def("_teacher_param_momentum(int updates, int total_iters, float start) -> float", teacher_param_momentum);
  m.def("_show_config() -> str", [] { return show_config(); });
  m.def("_kept_memory() -> int", kept_memory);
  m.def("_kept_memory_limit() -> int", kept_memory_limit);
  m.def("_set_kept_memory_limit(int bytes) -> ()", set_kept_memory_limit);
  m.def("_release_kept_memory() -> ()", release_kept_memory);
}

TORCH_LIBRARY_IMPL(momentum_bn, CompositeExplicitAutograd, m) {
  m.impl("_check_input", check_input_of_layer);
  m.impl("_check_parameters", check_parameters);
}

TORCH_LIBRARY_IMPL(momentum_bn, FuncTorchBatched, m) {
  m.impl("_check_input", check_input_of_layer);
  m.impl("_check_parameters", check_parameters);
}

}  // namespace momentum_bn
