#pragma once

#include "error.h"

#include <ATen/core/Tensor.h>

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace m2teacher {

/// Another process has ended, or does not answer.
class LostRanks : public UserError {
 public:
  using UserError::UserError;
};

/// The processes that train together, each with its number, its rank: this one alone, or those of a c10d process group
/// that somebody else has brought up. What they do together, all must do in the same order. Copies stand for the same
/// processes.
class Ranks {
 public:
  /// This process alone.
  Ranks() = default;
  /// @param process_group  name of a c10d process group that this process belongs to; empty: this process alone
  /// @throws UserError  there is none of that name, or torch was built without torch.distributed
  explicit Ranks(const std::string& process_group);

  int64_t rank() const;
  int64_t count() const;
  bool alone() const { return count() == 1; }
  /// Whether this is the rank that reads and writes for all.
  bool first() const { return rank() == 0; }
  const std::string& process_group() const { return process_group_; }

  /// How long a rank waits for the others.
  void set_timeout(std::chrono::milliseconds timeout) const;

  /// Returns when what was begun is done. @throws LostRanks
  using Wait = std::function<void()>;

  /// Begins to replace the tensor by its sum over all ranks, the same bits on each.
  Wait begin_sum(const at::Tensor& tensor) const;
  /// Begins to replace the tensor by the first rank's.
  Wait begin_copy_of_first(const at::Tensor& tensor) const;
  /// The first rank's text.
  std::string of_first(const std::string& text) const;
  /// The tensors of all ranks, which are of one shape, in the order of ranks.
  std::vector<at::Tensor> gather(const at::Tensor& tensor) const;

  /// Runs something that waits for other ranks, and says so in clear words if they are lost. @throws LostRanks
  static void reach_others(const std::function<void()>& collectives);

 private:
  struct Group;

  std::string process_group_;
  std::shared_ptr<const Group> group_;  // null: alone
};

}  // namespace m2teacher
