#include "ops/shared/group.h"

#include "ops/normalise/calls.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#ifdef USE_DISTRIBUTED  // as torch itself was compiled
#include <torch/csrc/distributed/c10d/Functional.hpp>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#endif

namespace momentum_bn {
namespace {

#ifdef USE_DISTRIBUTED

c10::intrusive_ptr<c10d::ProcessGroup> group_named(std::string_view name) {
  try {
    return c10d::resolve_process_group(std::string(name));
  } catch (const c10::Error&) {
    TORCH_CHECK_VALUE(false, "process_group must be a c10d process group that this process belongs to, or the name of ",
                      "one (got '", name, "', which torch.distributed does not know in this process)");
  }
}

/// Calls one of torch's operators with the group's name. The C++ functions put the group itself in its place, which a
/// graph that is made of the call could not hold.
at::Tensor call_by_name(const char* name, torch::jit::Stack arguments) {
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(arguments);
  return arguments.front().toTensor();
}

at::Tensor all_gather(const at::Tensor& local, std::string_view name) {
  const int64_t ranks = ranks_of_process_group(name);
  // On a GPU the stream waits, not this thread.
  return c10d::wait_tensor(c10d::all_gather_into_tensor(local.contiguous(), ranks, std::string(name)))
      .view({ranks, local.numel()});
}

#else

at::Tensor all_gather(const at::Tensor& local, std::string_view name) {
  check_process_group(name);
  return local;
}

#endif

/// An operator of its own, so that torch.func hands it plain tensors: collectives take no others.
at::Tensor group_statistics(const ops::GroupStatistics& call) {
  return all_gather(ops::call(ops::BatchStatistics{call.x}), call.process_group);
}

}  // namespace

#ifdef USE_DISTRIBUTED

void check_process_group(std::string_view name) { group_named(name); }

int64_t ranks_of_process_group(std::string_view name) { return group_named(name)->getSize(); }

at::Tensor sum_over_group(const at::Tensor& values, std::string_view name) {
  if (ranks_of_process_group(name) == 1) {
    return values;
  }
  const std::string group(name);
  return call_by_name("_c10d_functional::wait_tensor",
                      {call_by_name("_c10d_functional::all_reduce", {values.contiguous(), "sum", group})});
}

#else

void check_process_group(std::string_view /*name*/) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "process_group: this build of torch has no torch.distributed, use None");
}

int64_t ranks_of_process_group(std::string_view name) {
  check_process_group(name);
  return 1;
}

at::Tensor sum_over_group(const at::Tensor& values, std::string_view name) {
  check_process_group(name);
  return values;
}

#endif

Group::Group(const ops::MaybeWord& process_group, const ops::MaybeTensor& group_statistics) {
  if (group_statistics) {
    gathered_ = *group_statistics;
  }
  if (!process_group || gathered_.defined()) {
    return;
  }
  name_ = *process_group;
  ranks_ = ranks_of_process_group(name_);
}

void check_gathered(const at::Tensor& x, const at::Tensor& group_statistics) {
  const auto size = 2 * x.sym_size(1) + 1;
  TORCH_CHECK_VALUE(
      group_statistics.dim() == 2 && group_statistics.sym_size(0) >= 1 && group_statistics.sym_size(1) == size,
      "group_statistics must be (ranks, 2 * channels + 1), here (ranks, ", size, ") (got ",
      group_statistics.sym_sizes(), ")");
  TORCH_CHECK_VALUE(group_statistics.device() == x.device(), "group_statistics must be on x's device ", x.device(),
                    " (got ", group_statistics.device(), ")");
}

at::Tensor Group::statistics(const at::Tensor& x) const {
  auto all = gathered_.defined() ? gathered_ : ops::call(ops::GroupStatistics{x, name_});
  check_gathered(x, all);
  return all;
}

TORCH_LIBRARY_IMPL(momentum_bn, CompositeExplicitAutograd, m) { ops::implement<group_statistics>(m); }

}  // namespace momentum_bn
