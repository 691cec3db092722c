// Operators that compute no tensor: checks, formulas on numbers, and what was built.

#include "ops/normalise/calls.h"
#include "ops/normalise/inputs.h"
#include "ops/normalise/options.h"
#include "ops/shared/group.h"

#include <momentum_bn/memory.h>
#include <momentum_bn/schedule.h>
#include <momentum_bn/show_config.h>
#include <torch/library.h>

namespace momentum_bn {
namespace {

void check_options_of_layer(const ops::CheckOptions& call) {
  check_num_features(call.num_features);
  check_options(call.options);
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
  m.def("_check_process_group(str name) -> ()", check_process_group);
  m.def("_scheduled_momentum(int cur_iter, int total_iters) -> float", scheduled_momentum);
  m.def("_teacher_param_momentum(int updates, int total_iters, float start) -> float", teacher_param_momentum);
  m.def("_show_config() -> str", [] { return show_config(); });
  m.def("_kept_memory() -> int", kept_memory);
  m.def("_kept_memory_limit() -> int", kept_memory_limit);
  m.def("_set_kept_memory_limit(int bytes) -> ()", set_kept_memory_limit);
  m.def("_release_kept_memory() -> ()", release_kept_memory);
}

TORCH_LIBRARY_IMPL(momentum_bn, CompositeImplicitAutograd, m) { ops::implement<check_options_of_layer>(m); }

TORCH_LIBRARY_IMPL(momentum_bn, CompositeExplicitAutograd, m) {
  m.impl("_check_input", check_input_of_layer);
  m.impl("_check_parameters", check_parameters);
}

TORCH_LIBRARY_IMPL(momentum_bn, FuncTorchBatched, m) {
  m.impl("_check_input", check_input_of_layer);
  m.impl("_check_parameters", check_parameters);
}

}  // namespace momentum_bn
