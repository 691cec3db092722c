// Operators without a tensor to compute: checks, formulas on numbers, and what was built.

#include "ops/checks.h"
#include "ops/config.h"
#include "ops/group.h"
#include "ops/inputs.h"
#include "ops/ops.h"

#include <momentum_bn/memory.h>
#include <momentum_bn/schedule.h>
#include <momentum_bn/show_config.h>
#include <torch/library.h>

namespace momentum_bn {
namespace {

using ops::MaybeWord;
using ops::Word;

void check_options(int64_t num_features, double eps, std::optional<double> momentum, int64_t total_iters,
                   int64_t views_per_update, Word schedule, Word variance, MaybeWord activation) {
  TORCH_CHECK_VALUE(num_features >= 0, "num_features must be at least 0 (got ", num_features, ")");
  check_momentum(momentum);
  checked_config(eps, total_iters, views_per_update, schedule, variance, activation);
}

void check_input_of_layer(const at::Tensor& x, const ops::MaybeTensor& residual, int64_t num_features) {
  check_input(x, residual);
  check_channels(x, num_features);
}

}  // namespace

TORCH_LIBRARY_IMPL(momentum_bn, CompositeExplicitAutograd, m) {
  m.impl("_check_input", check_input_of_layer);
  m.impl("_check_parameters", check_parameters);
}

TORCH_LIBRARY_IMPL(momentum_bn, FuncTorchBatched, m) {
  m.impl("_check_input", check_input_of_layer);
  m.impl("_check_parameters", check_parameters);
}

TORCH_LIBRARY_IMPL(momentum_bn, CatchAll, m) {
  m.impl("_check_options", check_options);
  m.impl("_check_process_group", check_process_group);
  m.impl("_scheduled_momentum", scheduled_momentum);
  m.impl("_teacher_param_momentum", teacher_param_momentum);
  m.impl("_show_config", [] { return show_config(); });
  m.impl("_kept_memory", kept_memory);
  m.impl("_kept_memory_limit", kept_memory_limit);
  m.impl("_set_kept_memory_limit", set_kept_memory_limit);
  m.impl("_release_kept_memory", release_kept_memory);
}

}  // namespace momentum_bn
