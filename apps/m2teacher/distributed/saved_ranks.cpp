#include "distributed/saved_ranks.h"

#include "checkpoint/checksum.h"
#include "distributed/together.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/scalar_tensor.h>

#include <string_view>

namespace m2teacher {
namespace {

using State = std::map<std::string, at::Tensor>;

constexpr const char* kPrefix = "rank.";
constexpr const char* kCount = "rank.count";
constexpr std::string_view kVelocity = "optimiser.velocity.";

std::string prefix_of(int64_t rank) { return kPrefix + std::to_string(rank) + "."; }

/// All values, in the order of names, as bytes, on the CPU.
at::Tensor pack(const State& state) {
  std::vector<at::Tensor> parts;
  for (const auto& [name, tensor] : state) {
    parts.push_back(tensor.cpu().contiguous().view(-1).view(at::kByte));
  }
  return at::cat(parts);
}

/// @param like  names, shapes and dtypes
State unpack(const at::Tensor& bytes, const State& like) {
  State state;
  int64_t offset = 0;
  for (const auto& [name, tensor] : like) {
    const auto size = static_cast<int64_t>(tensor.nbytes());
    // A copy begins where its dtype may begin.
    state.emplace(name, bytes.narrow(0, offset, size).clone().view(tensor.scalar_type()).view(tensor.sizes()));
    offset += size;
  }
  return state;
}

/// Of everything that averaged gradients alone change.
std::string checksum_of_parameters(const State& state) {
  Checksum checksum;
  for (const auto& [name, velocity] : state) {
    if (!name.starts_with(kVelocity)) {
      continue;
    }
    for (const std::string& prefix : {std::string(kVelocity), std::string("student."), std::string("teacher.")}) {
      const auto found = state.find(prefix + name.substr(kVelocity.size()));
      if (found != state.end()) {
        checksum.update(found->second.const_data_ptr(), found->second.nbytes());
      }
    }
  }
  return checksum.digits();
}

void check_same_parameters(const State& state, const Ranks& ranks) {
  std::string digits = checksum_of_parameters(state);
  const at::Tensor own = at::from_blob(digits.data(), {static_cast<int64_t>(digits.size())}, at::kByte);
  const std::vector<at::Tensor> all = ranks.gather(own);
  for (int64_t rank = 1; rank < ranks.count(); ++rank) {
    if (!all[static_cast<size_t>(rank)].equal(all[0])) {
      together(ranks, [&] {
        throw UserError("rank " + std::to_string(rank) +
                        " has other parameters than rank 0: do all processes run the same torch on processors of one "
                        "kind?");
      });
    }
  }
}

}  // namespace

State gather_state(const Pretrainer& pretrainer, const Ranks& ranks) {
  State state = pretrainer.state();
  for (auto& [name, tensor] : state) {
    tensor = tensor.cpu();
  }
  if (ranks.alone()) {
    return state;
  }
  check_same_parameters(state, ranks);
  state.emplace(kCount, at::scalar_tensor(ranks.count(), at::kLong));
  const State own = pretrainer.own_state();
  if (own.empty()) {
    return state;
  }
  const std::vector<at::Tensor> all = ranks.gather(pack(own));
  for (int64_t rank = 1; rank < ranks.count(); ++rank) {
    for (const auto& [name, tensor] : unpack(all[static_cast<size_t>(rank)], own)) {
      state.emplace(prefix_of(rank) + name, tensor);
    }
  }
  return state;
}

SavedRanks split_state(const State& state, const State& own) {
  SavedRanks saved;
  if (const auto count = state.find(kCount); count != state.end() && count->second.numel() == 1) {
    saved.count = count->second.item<int64_t>();
  }
  for (const auto& [name, tensor] : state) {
    if (!name.starts_with(kPrefix)) {
      saved.state.emplace(name, tensor);
    }
  }
  for (int64_t rank = 1; rank < saved.count && !own.empty(); ++rank) {
    State& other = saved.others.emplace_back();
    for (const auto& [name, tensor] : own) {
      const auto found = state.find(prefix_of(rank) + name);
      if (found == state.end() || found->second.sizes() != tensor.sizes() ||
          found->second.scalar_type() != tensor.scalar_type()) {
        throw UserError("the saved run lacks '" + prefix_of(rank) + name + "', or has another one");
      }
      other.emplace(name, found->second);
    }
  }
  return saved;
}

void spread_state(Pretrainer& pretrainer, const Ranks& ranks, const std::vector<State>& others) {
  if (ranks.alone()) {
    return;
  }
  State state = pretrainer.state();
  std::vector<Ranks::Wait> waits;
  for (const auto& [name, tensor] : state) {
    waits.push_back(ranks.begin_copy_of_first(tensor));
  }
  for (const Ranks::Wait& wait : waits) {
    wait();
  }
  const at::Tensor known = at::scalar_tensor(static_cast<int64_t>(others.size()), at::kLong);
  ranks.begin_copy_of_first(known)();
  const State own = pretrainer.own_state();
  for (int64_t rank = 1; rank <= known.item<int64_t>() && !own.empty(); ++rank) {
    at::Tensor bytes = ranks.first() ? pack(others[static_cast<size_t>(rank - 1)]) : at::empty_like(pack(own));
    ranks.begin_copy_of_first(bytes)();
    if (rank == ranks.rank()) {
      for (const auto& [name, tensor] : unpack(bytes, own)) {
        state[name] = tensor;
      }
    }
  }
  pretrainer.load_state(state);
}

}  // namespace m2teacher
