#include "layer.h"

#include "buffer.h"
#include "emulator.h"
#include "inputs.h"
#include "oracle.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>

namespace momentum_bn::kernels::cuda::test {
namespace {

using kernels::test::accumulate_type;
using kernels::test::Buffer;
using kernels::test::rounded;
using kernels::test::uniform;

/// Values on the emulated device, or none.
class Memory {
 public:
  Memory() = default;
  Memory(Type type, const std::vector<double>& values, int64_t offset = 0) {
    if (values.empty()) {
      return;
    }
    buffer_ = std::make_unique<Buffer>(type, values, offset);
    before_ = buffer_->checksum();
  }
  static Memory fresh(Type type, int64_t size, int64_t offset = 0) {
    Memory memory;
    memory.buffer_ = std::make_unique<Buffer>(type, size, offset);
    memory.before_ = memory.buffer_->checksum();
    return memory;
  }

  void* data() const { return buffer_ ? buffer_->data() : nullptr; }
  std::vector<double> values() const { return buffer_ ? buffer_->values() : std::vector<double>(); }
  void expect_guards(const char* name) const {
    EXPECT_TRUE(!buffer_ || buffer_->guards_are_intact()) << "written beyond " << name;
  }
  void expect_unchanged(const char* name) const {
    expect_guards(name);
    EXPECT_TRUE(!buffer_ || buffer_->checksum() == before_) << name << " was changed";
  }

 private:
  std::unique_ptr<Buffer> buffer_;
  uint64_t before_ = 0;
};

/// A workspace with nothing in it that could be mistaken for a number, and counters.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : workspace_(Memory::fresh(Type::kDouble, static_cast<int64_t>(bytes + 7) / 8)) {}

  void* workspace() const { return workspace_.data(); }
  unsigned* counters() { return counters_.data(); }
  void expect_clean() const {
    workspace_.expect_guards("the workspace");
    EXPECT_TRUE(std::all_of(counters_.begin(), counters_.end(), [](unsigned count) { return count == 0; }))
        << "counters are not back at 0";
    EXPECT_EQ(emulator::take_errors(), "");
  }

 private:
  Memory workspace_;
  std::vector<unsigned> counters_ = std::vector<unsigned>(kCounters);
};

/// The state on the emulated device.
class StateMemory {
 public:
  StateMemory(Type type, LayerState& state)
      : state_(state),
        running_mean_(type, state.running_mean),
        running_var_(type, state.running_var),
        view_mean_sum_(type, state.view_mean_sum),
        view_var_sum_(type, state.view_var_sum),
        float_momentum_(static_cast<float>(state.momentum)) {}

  State args() {
    if (state_.is_batch_norm) {
      return {running_mean_.data(),
              running_var_.data(),
              &state_.num_batches_tracked,
              nullptr,
              nullptr,
              nullptr,
              nullptr,
              nullptr,
              false};
    }
    return {running_mean_.data(),
            running_var_.data(),
            &state_.num_batches_tracked,
            view_mean_sum_.data(),
            view_var_sum_.data(),
            &state_.view_count,
            &state_.cur_iter,
            state_.momentum_is_float ? static_cast<void*>(&float_momentum_) : &state_.momentum,
            state_.momentum_is_float};
  }

  void read_back() {
    for (const Memory* memory : {&running_mean_, &running_var_, &view_mean_sum_, &view_var_sum_}) {
      memory->expect_guards("the state");
    }
    state_.running_mean = running_mean_.values();
    state_.running_var = running_var_.values();
    state_.view_mean_sum = view_mean_sum_.values();
    state_.view_var_sum = view_var_sum_.values();
    if (state_.momentum_is_float) {
      state_.momentum = float_momentum_;
    }
  }

 private:
  LayerState& state_;
  Memory running_mean_;
  Memory running_var_;
  Memory view_mean_sum_;
  Memory view_var_sum_;
  float float_momentum_;
};

size_t index(int64_t i) { return static_cast<size_t>(i); }

/// Mean, sum of squared deviations and number of one channel's values.
struct ChannelStatistics {
  double mean;
  double m2;
  double count;
};

std::vector<ChannelStatistics> channel_statistics(const ForwardCall& call) {
  const int64_t channels = call.shape.channels;
  std::vector<ChannelStatistics> result;
  if (call.gathered.empty()) {
    const auto exact = kernels::test::statistics(call.shape, call.x);
    for (int64_t c = 0; c < channels; ++c) {
      result.push_back(
          {exact.mean[index(c)], exact.m2[index(c)], static_cast<double>(call.shape.values_per_channel())});
    }
    return result;
  }
  for (int64_t c = 0; c < channels; ++c) {
    long double count = 0;
    long double sum = 0;
    long double squares = 0;
    const auto row = [&](int64_t rank) { return call.gathered.data() + rank * (2 * channels + 1); };
    for (int64_t rank = 0; rank < call.ranks; ++rank) {
      count += row(rank)[2 * channels];
      sum += static_cast<long double>(row(rank)[c]) * row(rank)[2 * channels];
    }
    const long double mean = sum / count;
    for (int64_t rank = 0; rank < call.ranks; ++rank) {
      const long double delta = row(rank)[c] - mean;
      squares += row(rank)[channels + c] + delta * delta * row(rank)[2 * channels];
    }
    result.push_back({static_cast<double>(mean), static_cast<double>(squares), static_cast<double>(count)});
  }
  return result;
}

double scheduled(int64_t cur_iter, int64_t total_iters) {
  const double progress = std::min(1.0, static_cast<double>(cur_iter) / static_cast<double>(total_iters));
  return (std::cos(M_PI * progress) + 1) / 2;
}

void move_schedule(const BlendOptions& options, LayerState& state) {
  ++state.cur_iter;
  if (!options.cosine || state.momentum < 0) {
    return;
  }
  state.momentum = scheduled(state.cur_iter, options.total_iters);
  if (state.momentum_is_float) {
    state.momentum = static_cast<float>(state.momentum);
  }
}

}  // namespace

LayerState LayerState::used(Type type, int64_t channels) {
  const Type kept = accumulate_type(type);
  LayerState state;
  state.running_mean = rounded(kept, uniform(channels, -0.5, 0.5, 51));
  state.running_var = rounded(kept, uniform(channels, 0.5, 2, 52));
  state.view_mean_sum.assign(index(channels), 0);
  state.view_var_sum.assign(index(channels), 0);
  state.num_batches_tracked = 6;
  state.cur_iter = 3;
  state.momentum = 0.7;
  return state;
}

LayerState LayerState::used_batch_norm(Type type, int64_t channels) {
  LayerState state = used(type, channels);
  state.is_batch_norm = true;
  state.view_mean_sum.clear();
  state.view_var_sum.clear();
  return state;
}

ForwardResult run_forward(const ForwardCall& call, LayerState& state, const Device& device) {
  const Type kept = accumulate_type(call.type);
  const int64_t channels = call.shape.channels;
  const Memory x(call.type, call.x, call.offset);
  const Memory residual(call.type, call.residual, 2 * call.offset);
  const Memory fresh = call.in_place ? Memory() : Memory::fresh(call.type, call.shape.values(), 3 * call.offset);
  const Memory& y = call.in_place ? x : fresh;
  const Memory weight(kept, call.weight);
  const Memory bias(kept, call.bias);
  const Memory saved = Memory::fresh(kept, (call.through_statistics ? 6 : 3) * channels);
  const Memory gathered(Type::kDouble, call.gathered);
  const Memory batch_mean = call.functional_momentum ? Memory::fresh(kept, channels) : Memory();
  const Memory batch_var = call.functional_momentum ? Memory::fresh(kept, channels) : Memory();
  StateMemory state_memory(kept, state);
  Scratch scratch(forward_workspace_bytes(call.type, call.shape, device));

  ForwardArgs args = {};
  args.type = call.type;
  args.shape = call.shape;
  args.x = x.data();
  args.residual = residual.data();
  args.y = y.data();
  args.relu = call.relu;
  args.weight = weight.data();
  args.bias = bias.data();
  args.saved = saved.data();
  args.through_statistics = call.through_statistics;
  args.options = call.options;
  args.tracks = state.tracks();
  if (state.tracks()) {
    args.state = state_memory.args();
  }
  args.gathered = static_cast<const double*>(gathered.data());
  args.ranks = call.ranks;
  args.batch_mean = batch_mean.data();
  args.batch_var = batch_var.data();
  args.momentum = call.functional_momentum.value_or(call.update_momentum.value_or(-1));
  args.workspace = scratch.workspace();
  args.counters = scratch.counters();
  EXPECT_EQ(forward(args, device), 0);

  scratch.expect_clean();
  if (!call.in_place) {
    x.expect_unchanged("x");
  }
  residual.expect_unchanged("the residual");
  weight.expect_unchanged("weight");
  bias.expect_unchanged("bias");
  gathered.expect_unchanged("gathered");
  for (const Memory* memory : {&y, &saved, &batch_mean, &batch_var}) {
    memory->expect_guards("an output");
  }
  state_memory.read_back();
  return {y.values(), saved.values(), batch_mean.values(), batch_var.values()};
}

ForwardResult expected_forward(const ForwardCall& call, LayerState& state) {
  const auto batch = channel_statistics(call);
  const int64_t channels = call.shape.channels;
  const double m = call.functional_momentum ? *call.functional_momentum
                   : state.is_batch_norm    ? 1
                   : state.momentum >= 0    ? state.momentum
                                            : 1 / static_cast<double>(state.cur_iter + 1);
  const double update =
      state.is_batch_norm ? call.update_momentum.value_or(1 / static_cast<double>(state.num_batches_tracked + 1)) : m;
  const bool updates = state.tracks() && !call.functional_momentum;
  const int64_t views = state.view_count + 1;
  const bool complete = state.is_batch_norm || views >= call.options.views_per_update;
  kernels::test::Coefficients coefficients;
  ForwardResult result;
  result.saved.resize(index((call.through_statistics ? 6 : 3) * channels));
  for (int64_t channel = 0; channel < channels; ++channel) {
    const size_t c = index(channel);
    const double n = batch[c].count;
    const double var = batch[c].m2 / (n - 1);
    double norm_mean = batch[c].mean;
    double norm_var = var;
    if (call.options.variance == Variance::Published) {
      norm_var = var * n / (n - 1);
    }
    if (call.options.variance == Variance::Biased) {
      norm_var = var * (n - 1) / n;
    }
    if (state.tracks()) {
      norm_mean = m * norm_mean + (1 - m) * state.running_mean[c];
      norm_var = m * norm_var + (1 - m) * state.running_var[c];
    }
    const double rstd = 1 / std::sqrt(norm_var + call.options.eps);
    const double weight = call.weight.empty() ? 1 : call.weight[c];
    coefficients.center.push_back(norm_mean);
    coefficients.scale.push_back(weight * rstd);
    coefficients.shift.push_back(call.bias.empty() ? 0 : call.bias[c]);
    // In two rows: the test adds them up.
    result.saved[c] = norm_mean;
    result.saved[c + index(2 * channels)] = rstd;
    if (call.through_statistics) {
      const double of_batch = state.tracks() ? m : 1;
      const double factor = call.options.variance == Variance::Published  ? n / (n - 1) * (n / (n - 1))
                            : call.options.variance == Variance::Unbiased ? n / (n - 1)
                                                                          : 1;
      result.saved[c + index(3 * channels)] = norm_mean - batch[c].mean;
      result.saved[c + index(4 * channels)] = of_batch / n;
      result.saved[c + index(5 * channels)] = of_batch * factor / n;
    }
    if (call.functional_momentum) {
      result.batch_mean.push_back(batch[c].mean);
      result.batch_var.push_back(var);
    }
    if (!updates) {
      continue;
    }
    const double mean_sum = (state.is_batch_norm ? 0 : state.view_mean_sum[c]) + batch[c].mean;
    const double var_sum = (state.is_batch_norm ? 0 : state.view_var_sum[c]) + var;
    const auto k = static_cast<double>(views);
    if (complete) {
      const double factor = call.options.variance == Variance::Published ? n / (n - 1) : 1;
      state.running_mean[c] = update * mean_sum / k + (1 - update) * state.running_mean[c];
      state.running_var[c] = update * factor * var_sum / k + (1 - update) * state.running_var[c];
    }
    if (state.is_batch_norm) {
      continue;
    }
    state.view_mean_sum[c] = complete ? 0 : mean_sum;
    state.view_var_sum[c] = complete ? 0 : var_sum;
  }
  if (updates) {
    ++state.num_batches_tracked;
    if (!state.is_batch_norm) {
      state.view_count = complete ? 0 : views;
      if (complete) {
        move_schedule(call.options, state);
      }
    }
  }
  result.y = kernels::test::normalised(call.shape, call.x, coefficients, call.residual, call.relu);
  return result;
}

std::vector<double> run_statistics(const ForwardCall& call, const Device& device) {
  const Memory x(call.type, call.x, call.offset);
  const Memory statistics = Memory::fresh(Type::kDouble, 2 * call.shape.channels + 1);
  Scratch scratch(forward_workspace_bytes(call.type, call.shape, device));
  const StatisticsArgs args = {
      call.type,           call.shape,         x.data(), static_cast<double*>(statistics.data()),
      scratch.workspace(), scratch.counters(), nullptr};
  EXPECT_EQ(cuda::statistics(args, device), 0);
  scratch.expect_clean();
  x.expect_unchanged("x");
  statistics.expect_guards("statistics");
  return statistics.values();
}

std::vector<double> expected_statistics(const Shape& shape, const std::vector<double>& x) {
  auto [result, m2] = kernels::test::statistics(shape, x);
  result.insert(result.end(), m2.begin(), m2.end());
  result.push_back(static_cast<double>(shape.values_per_channel()));
  return result;
}

std::string describe(const BackwardCall& call) {
  return describe(static_cast<const kernels::test::BackwardInputs&>(call)) + (call.mask_from_x ? " from x" : "") +
         (call.gradient == Gradient::kThroughStatistics           ? " through the statistics"
          : call.gradient == Gradient::kThroughStatisticsInHalves ? " through the statistics in halves"
                                                                  : "");
}

namespace {

void run(Gradient gradient, BackwardArgs args, const Device& device) {
  if (gradient != Gradient::kThroughStatisticsInHalves) {
    EXPECT_EQ(backward(args, device), 0);
    return;
  }
  auto first = args;
  first.dx = nullptr;
  EXPECT_EQ(gradient_sums(first, device), 0);
  if (args.dresidual) {  // it is the gradient behind the mask
    args.dy = args.dresidual;
    args.y = nullptr;
    args.relu = false;
  }
  args.dweight = args.dbias = args.dresidual = nullptr;
  EXPECT_EQ(gradient_of_input(args, device), 0);
}

}  // namespace

BackwardResult run_backward(const BackwardCall& call, const Device& device) {
  const Type kept = accumulate_type(call.type);
  const int64_t channels = call.shape.channels;
  const Memory dy(call.type, call.dy, call.offset);
  const Memory x(call.type, call.x, 2 * call.offset);
  const Memory y = call.mask_from_x ? Memory() : Memory(call.type, call.y, 3 * call.offset);
  const Memory weight(kept, call.weight);
  const Memory bias(kept, call.bias);
  const Memory saved(kept, call.saved);
  const bool fresh_dx = call.with_dx && !call.in_place;
  const Memory dx = fresh_dx ? Memory::fresh(call.type, call.shape.values(), call.offset) : Memory();
  const Memory dresidual =
      call.with_dresidual ? Memory::fresh(call.type, call.shape.values(), 2 * call.offset) : Memory();
  const Memory dweight = call.x.empty() ? Memory() : Memory::fresh(kept, channels);
  const Memory dbias = call.with_dbias ? Memory::fresh(kept, channels) : Memory();
  const Memory sums =
      call.gradient == Gradient::kThroughStatisticsInHalves ? Memory::fresh(Type::kDouble, 2 * channels) : Memory();
  Scratch scratch(backward_workspace_bytes(call.type, call.shape, device));

  BackwardArgs args = {};
  args.type = call.type;
  args.shape = call.shape;
  args.dy = dy.data();
  args.x = x.data();
  args.relu = call.mask_from_x || y.data();
  args.y = y.data();
  args.weight = weight.data();
  args.bias = bias.data();
  args.saved = saved.data();
  args.through_statistics = call.gradient != Gradient::kConstantStatistics;
  args.dx = call.in_place ? dy.data() : dx.data();
  args.dresidual = dresidual.data();
  args.dweight = dweight.data();
  args.dbias = dbias.data();
  args.workspace = scratch.workspace();
  args.counters = scratch.counters();
  args.sums = static_cast<double*>(sums.data());
  run(call.gradient, args, device);

  scratch.expect_clean();
  if (!call.in_place) {
    dy.expect_unchanged("dy");
  }
  x.expect_unchanged("x");
  y.expect_unchanged("y");
  weight.expect_unchanged("weight");
  bias.expect_unchanged("bias");
  saved.expect_unchanged("saved");
  for (const Memory* memory : {&dy, &dx, &dresidual, &dweight, &dbias, &sums}) {
    memory->expect_guards("an output");
  }
  return {call.in_place ? dy.values() : dx.values(), dresidual.values(), dweight.values(), dbias.values(),
          sums.values()};
}

BackwardResult expected_backward(const BackwardCall& call) {
  const size_t channels = index(call.shape.channels);
  kernels::test::Coefficients coefficients;
  for (size_t c = 0; c < channels; ++c) {
    coefficients.center.push_back(call.saved[c] + call.saved[channels + c]);
    coefficients.scale.push_back((call.weight.empty() ? 1 : call.weight[c]) * call.saved[2 * channels + c]);
  }
  const auto& x = call.x.empty() ? call.dy : call.x;
  const auto gradients =
      call.gradient == Gradient::kConstantStatistics
          ? kernels::test::gradients(call.shape, call.dy, x, call.y, coefficients)
          : kernels::test::gradients_through_statistics(call.shape, call.dy, x, call.y, {call.saved, call.weight});
  BackwardResult result;
  if (call.with_dx) {
    result.dx = gradients.dx;
  }
  if (call.with_dresidual) {
    result.dresidual = gradients.dresidual;
  }
  if (call.with_dbias) {
    result.dbias = gradients.sum_g;
  }
  for (size_t c = 0; c < channels && !call.x.empty(); ++c) {
    result.dweight.push_back(gradients.sum_gx[c] * call.saved[2 * channels + c]);
  }
  if (call.gradient == Gradient::kThroughStatisticsInHalves) {
    result.sums = gradients.sum_g;
    result.sums.insert(result.sums.end(), gradients.sum_gx.begin(), gradients.sum_gx.end());
  }
  return result;
}

}  // namespace momentum_bn::kernels::cuda::test
