#include "training/gradient_sum.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <functional>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

namespace m2teacher {

struct GradientSum::State {
  struct Bucket {
    int64_t entries = 0;
    int64_t missing = 0;  // of its entries
    at::Tensor values;
  };
  struct Entry {
    at::Tensor parameter;
    size_t bucket = 0;
    int64_t offset = 0;
    int64_t passes_left = 0;   // of the batch
    int64_t batches_left = 0;  // with the one at hand
    at::Tensor place;          // in the bucket, as the parameter lies in memory
  };

  State(const Ranks& chosen, int64_t passes_of_batch, int64_t batches_of_step)
      : ranks(chosen), passes(passes_of_batch), batches(batches_of_step) {}

  /// A parameter has got its gradient of one pass. Threads that run passes at once may say so at once: torch's lock
  /// covers the gradient, but not this call.
  void add(Entry& entry) {
    if (!was_last_pass(entry)) {
      return;
    }
    entry.batches_left == batches ? entry.place.copy_(entry.parameter.grad())
                                  : entry.place.add_(entry.parameter.grad());
    if (--entry.batches_left > 0) {
      entry.passes_left = passes;
      entry.parameter.mutable_grad().reset();
      return;
    }
    const std::lock_guard lock(mutex);
    --buckets[entry.bucket].missing;
    // All ranks must send them in the same order.
    while (waits.size() < buckets.size() && buckets[waits.size()].missing == 0) {
      waits.push_back(ranks.begin_sum(buckets[waits.size()].values));
    }
  }

  bool was_last_pass(Entry& entry) {
    const std::lock_guard lock(mutex);
    return --entry.passes_left == 0;
  }

  void expect_step() {
    waits.clear();
    for (Bucket& bucket : buckets) {
      bucket.missing = bucket.entries;
    }
    for (Entry& entry : entries) {
      entry.passes_left = passes;
      entry.batches_left = batches;
    }
  }

  Ranks ranks;
  int64_t passes;
  int64_t batches;
  std::vector<Bucket> buckets;
  std::vector<Entry> entries;
  std::mutex mutex;
  std::vector<Ranks::Wait> waits;  // for the buckets that are on their way
};

namespace {

class CallAfterPass : public torch::autograd::PostAccumulateGradHook {
 public:
  explicit CallAfterPass(std::function<void()> call) : call_(std::move(call)) {}
  void operator()(const torch::autograd::Variable& /*parameter*/) override { call_(); }

 private:
  std::function<void()> call_;
};

}  // namespace

GradientSum::GradientSum(const torch::nn::Module& module, const Ranks& ranks, int64_t passes, int64_t batches,
                         int64_t bucket_bytes)
    : state_(std::make_shared<State>(ranks, passes, batches)) {
  const std::vector<at::Tensor> parameters = module.parameters();
  std::vector<int64_t> sizes;  // of the buckets, in values
  for (auto parameter = parameters.rbegin(); parameter != parameters.rend(); ++parameter) {
    const auto most = bucket_bytes / parameter->element_size();
    if (sizes.empty() || sizes.back() + parameter->numel() > most) {
      sizes.push_back(0);
      state_->buckets.emplace_back();
    }
    state_->entries.push_back(
        {.parameter = *parameter, .bucket = sizes.size() - 1, .offset = sizes.back(), .place = {}});
    ++state_->buckets.back().entries;
    sizes.back() += parameter->numel();
  }
  for (size_t i = 0; i < sizes.size(); ++i) {
    state_->buckets[i].values = at::empty({sizes[i]}, parameters.front().options().requires_grad(false));
  }
  for (State::Entry& entry : state_->entries) {
    entry.place = state_->buckets[entry.bucket].values.as_strided(entry.parameter.sizes(), entry.parameter.strides(),
                                                                  entry.offset);
    torch::autograd::impl::set_post_acc_grad_hooks(
        entry.parameter, std::make_unique<CallAfterPass>([state = state_, &entry] { state->add(entry); }));
  }
  state_->expect_step();
}

GradientSum::~GradientSum() {
  for (const State::Entry& entry : state_->entries) {
    torch::autograd::impl::set_post_acc_grad_hooks(entry.parameter, nullptr);
  }
}

void GradientSum::finish() {
  if (state_->waits.size() != state_->buckets.size()) {
    throw std::logic_error("a parameter has not got the gradients of all passes and batches");
  }
  for (const Ranks::Wait& wait : state_->waits) {
    wait();
  }
  for (State::Entry& entry : state_->entries) {
    entry.parameter.mutable_grad() = entry.place;
  }
  state_->expect_step();
}

}  // namespace m2teacher
