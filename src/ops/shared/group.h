#pragma once

#include "ops/shared/operator.h"

#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>

// Groups of processes (torch.distributed, c10d) whose layers normalise by the statistics of all their values together.

namespace momentum_bn {

/// @throws c10::ValueError           this process belongs to no c10d group of that name
/// @throws c10::NotImplementedError  torch was built without torch.distributed
void check_process_group(std::string_view name);

/// @throws as check_process_group
int64_t ranks_of_process_group(std::string_view name);

/// The sum of all ranks' `values`, which are of one shape and dtype: one all_reduce.
at::Tensor sum_over_group(const at::Tensor& values, std::string_view name);

/// `group_statistics` of normalise/schemas.cpp fits x. @throws c10::ValueError
void check_gathered(const at::Tensor& x, const at::Tensor& group_statistics);

/// The processes of one training forward: `process_group` and `group_statistics` of schemas.cpp.
class Group {
 public:
  /// @throws as check_process_group
  Group(const ops::MaybeWord& process_group, const ops::MaybeTensor& group_statistics);

  /// Whether there are other processes to ask; where there are none, the collective can be left out.
  bool has_others() const { return ranks_ > 1 || gathered_.defined(); }

  /// What each rank has of `_batch_statistics`, (ranks, 2C + 1), in the order of ranks: the same bits on all of them.
  at::Tensor statistics(const at::Tensor& x) const;

 private:
  std::string name_;
  int64_t ranks_ = 1;
  at::Tensor gathered_;
};

}  // namespace momentum_bn
