#pragma once

#include "training/pretrainer.h"

#include <map>
#include <string>
#include <vector>

namespace m2teacher {

// A checkpoint holds the state of the first rank, and of every other one what it has for itself, as `rank.R.NAME`, with
// their number as `rank.count`. With one rank there are no such entries.

/// The whole run's state, in tensors of the CPU, on the first rank; the others take part, and get their own.
/// @throws LostRanks
/// @throws UserError  the parameters are not the same bits on all ranks, as they must be
std::map<std::string, at::Tensor> gather_state(const Pretrainer& pretrainer, const Ranks& ranks);

/// What a checkpoint says of ranks.
struct SavedRanks {
  int64_t count = 1;
  std::map<std::string, at::Tensor> state;                ///< `Pretrainer::state()` of the first
  std::vector<std::map<std::string, at::Tensor>> others;  ///< `Pretrainer::own_state()` of the following ones
};

/// @param own  names, shapes and dtypes of what a rank has for itself; empty: nothing
/// @throws UserError  an entry of a rank is missing, or of another shape or dtype
SavedRanks split_state(const std::map<std::string, at::Tensor>& state, const std::map<std::string, at::Tensor>& own);

/// Gives every rank the state that the first one has, and those that are among the `others` their own. What the first
/// rank says counts; a rank that the run had not before begins with the first one's. @throws LostRanks
void spread_state(Pretrainer& pretrainer, const Ranks& ranks,
                  const std::vector<std::map<std::string, at::Tensor>>& others);

}  // namespace m2teacher
