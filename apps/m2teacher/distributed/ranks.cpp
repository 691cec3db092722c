#include "distributed/ranks.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/util/Exception.h>

#ifdef USE_DISTRIBUTED  // as torch itself was compiled
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#endif

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace m2teacher {
namespace {

/// @param reason  what c10d says; its first sentence tells
LostRanks lost(std::string reason) {
  reason.resize(std::min({reason.size(), reason.find('\n'), reason.find(". ")}));
  return LostRanks("the other processes of this training have ended or do not answer: " + reason);
}

}  // namespace

void Ranks::reach_others(const std::function<void()>& collectives) {
  try {
    collectives();
  } catch (const UserError&) {
    throw;
  } catch (const c10::DistError& error) {
    throw lost(error.what_without_backtrace());
  } catch (const std::runtime_error& error) {  // what Gloo throws
    throw lost(error.what());
  }
}

#ifdef USE_DISTRIBUTED

struct Ranks::Group {
  c10::intrusive_ptr<c10d::ProcessGroup> handle;
};

namespace {

Ranks::Wait waiting_for(const c10::intrusive_ptr<c10d::Work>& work) {
  return [work] { Ranks::reach_others([&] { work->wait(); }); };
}

}  // namespace

Ranks::Ranks(const std::string& process_group) : process_group_(process_group) {
  if (process_group.empty()) {
    return;
  }
  try {
    group_ = std::make_shared<Group>(Group{c10d::resolve_process_group(process_group)});
  } catch (const c10::Error&) {
    throw UserError("process group: got '" + process_group + "', which torch.distributed does not know here");
  }
}

int64_t Ranks::rank() const { return group_ ? group_->handle->getRank() : 0; }
int64_t Ranks::count() const { return group_ ? group_->handle->getSize() : 1; }

void Ranks::set_timeout(std::chrono::milliseconds timeout) const {
  if (group_) {
    group_->handle->setTimeout(timeout);
  }
}

Ranks::Wait Ranks::begin_sum(const at::Tensor& tensor) const {
  if (!group_) {
    return [] {};
  }
  std::vector<at::Tensor> tensors = {tensor};
  return waiting_for(group_->handle->allreduce(tensors));
}

Ranks::Wait Ranks::begin_copy_of_first(const at::Tensor& tensor) const {
  if (!group_) {
    return [] {};
  }
  std::vector<at::Tensor> tensors = {tensor};
  return waiting_for(group_->handle->broadcast(tensors));
}

std::vector<at::Tensor> Ranks::gather(const at::Tensor& tensor) const {
  if (!group_) {
    return {tensor};
  }
  std::vector<at::Tensor> own = {tensor};
  std::vector<std::vector<at::Tensor>> all(1);
  for (int64_t rank = 0; rank < count(); ++rank) {
    all[0].push_back(at::empty_like(tensor));
  }
  waiting_for(group_->handle->allgather(all, own))();
  return all[0];
}

#else

struct Ranks::Group {};

Ranks::Ranks(const std::string& process_group) {
  if (!process_group.empty()) {
    throw UserError("process group: this build of torch has no torch.distributed");
  }
}

int64_t Ranks::rank() const { return 0; }
int64_t Ranks::count() const { return 1; }
void Ranks::set_timeout(std::chrono::milliseconds /*timeout*/) const {}
Ranks::Wait Ranks::begin_sum(const at::Tensor& /*tensor*/) const {
  return [] {};
}
Ranks::Wait Ranks::begin_copy_of_first(const at::Tensor& /*tensor*/) const {
  return [] {};
}
std::vector<at::Tensor> Ranks::gather(const at::Tensor& tensor) const { return {tensor}; }

#endif

std::string Ranks::of_first(const std::string& text) const {
  if (alone()) {
    return text;
  }
  const at::Tensor size = at::scalar_tensor(static_cast<int64_t>(text.size()), at::kLong);
  begin_copy_of_first(size)();
  const at::Tensor bytes = at::empty({std::max<int64_t>(1, size.item<int64_t>())}, at::kByte);
  if (first()) {
    std::memcpy(bytes.mutable_data_ptr(), text.data(), text.size());
  }
  begin_copy_of_first(bytes)();
  return {static_cast<const char*>(bytes.const_data_ptr()), static_cast<size_t>(size.item<int64_t>())};
}

}  // namespace m2teacher
