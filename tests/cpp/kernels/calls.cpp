#include "calls.h"

#include "inputs.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <memory>
#include <optional>

namespace momentum_bn::kernels::test {
namespace {

/// Of channels: as many values as there are channels, then NaN up to what the kernels may read.
class ChannelValues {
 public:
  ChannelValues(Type type, int64_t channels) : buffer_(accumulate_type(type), channels + kPadding) {}
  ChannelValues(Type type, const std::vector<double>& values)
      : ChannelValues(type, static_cast<int64_t>(values.size())) {
    for (size_t c = 0; c < values.size(); ++c) buffer_.set(static_cast<int64_t>(c), values[c]);
  }

  Buffer& buffer() { return buffer_; }
  std::vector<double> values() const {
    auto all = buffer_.values();
    all.resize(all.size() - static_cast<size_t>(kPadding));
    return all;
  }

 private:
  Buffer buffer_;
};

/// The tensors of one forward call.
struct ForwardMemory {
  explicit ForwardMemory(const ForwardCall& call) : x(call.type, call.x, call.offset), x_before(x.checksum()) {
    if (!call.residual.empty()) {
      residual.emplace(call.type, call.residual, 2 * call.offset);
      residual_before = residual->checksum();
    }
    if (!call.in_place) fresh.emplace(call.type, call.shape.values(), 3 * call.offset);
  }

  Buffer& y() { return fresh ? *fresh : x; }

  void attach(const ForwardCall& call, ForwardArgs& args) {
    args.type = call.type;
    args.shape = call.shape;
    args.x = x.data();
    args.residual = residual ? residual->data() : nullptr;
    args.y = y().data();
    args.relu = call.relu;
    args.parallel_for = call.parallel_for;
  }

  void expect_nothing_else_written() {
    EXPECT_TRUE(y().guards_are_intact()) << "written beyond y";
    if (fresh) {
      EXPECT_EQ(x.checksum(), x_before) << "x was changed";
    }
    if (residual) {
      EXPECT_EQ(residual->checksum(), residual_before) << "the residual was changed";
    }
  }

  Buffer x;
  uint64_t x_before;
  std::optional<Buffer> residual;
  uint64_t residual_before = 0;
  std::optional<Buffer> fresh;
};

/// Blends as `rule` says and counts the calls.
struct BlendState {
  BlendState(Type type, int64_t channels, const BlendRule& by)
      : rule(by),
        mean(Type::kDouble, channels),
        m2(Type::kDouble, channels),
        center(type, channels),
        scale(type, channels),
        shift(type, channels),
        calls(static_cast<size_t>(channels)) {}

  void blend(int64_t channel) {
    ++calls[static_cast<size_t>(channel)];
    const double exact_center = mean.get(channel);
    const auto [exact_scale, exact_shift] = rule(channel, exact_center, m2.get(channel));
    center.buffer().set(channel, exact_center);
    scale.buffer().set(channel, exact_scale);
    const double rest = exact_center - center.buffer().get(channel);
    shift.buffer().set(channel, exact_shift - (std::isfinite(rest) ? rest : 0) * exact_scale);
  }

  void attach(ForwardArgs& args) {
    args.center = center.buffer().data();
    args.scale = scale.buffer().data();
    args.shift = shift.buffer().data();
    args.mean = static_cast<double*>(mean.data());
    args.m2 = static_cast<double*>(m2.data());
    args.blend_context = this;
    args.blend = [](void* context, int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) static_cast<BlendState*>(context)->blend(c);
    };
  }

  const BlendRule& rule;
  Buffer mean;
  Buffer m2;
  ChannelValues center;
  ChannelValues scale;
  ChannelValues shift;
  std::vector<std::atomic<int>> calls;
};

}  // namespace

ForwardResult run_forward(const KernelTable& table, const ForwardCall& call, const BlendRule& rule) {
  ForwardMemory memory(call);
  BlendState state(call.type, call.shape.channels, rule);
  ForwardArgs args = {};
  memory.attach(call, args);
  state.attach(args);
  table.forward(args);
  for (size_t c = 0; c < state.calls.size(); ++c) EXPECT_EQ(state.calls[c], 1) << "blends of channel " << c;
  memory.expect_nothing_else_written();
  for (const Buffer* of_channels : {&state.mean, &state.m2}) EXPECT_TRUE(of_channels->guards_are_intact());
  return {memory.y().values(),
          state.mean.values(),
          state.m2.values(),
          {state.center.values(), state.scale.values(), state.shift.values()}};
}

ForwardResult run_statistics(const KernelTable& table, const ForwardCall& call) {
  Buffer x(call.type, call.x, call.offset);
  const uint64_t x_before = x.checksum();
  Buffer mean(Type::kDouble, call.shape.channels);
  Buffer m2(Type::kDouble, call.shape.channels);
  ForwardArgs args = {};
  args.type = call.type;
  args.shape = call.shape;
  args.x = x.data();
  args.mean = static_cast<double*>(mean.data());
  args.m2 = static_cast<double*>(m2.data());
  args.parallel_for = call.parallel_for;
  table.statistics(args);
  EXPECT_EQ(x.checksum(), x_before) << "x was changed";
  for (const Buffer* of_channels : {&mean, &m2}) EXPECT_TRUE(of_channels->guards_are_intact());
  return {{}, mean.values(), m2.values(), {}};
}

ForwardResult run_normalize(const KernelTable& table, const ForwardCall& call, const Coefficients& coefficients) {
  ForwardMemory memory(call);
  ChannelValues center(call.type, coefficients.center);
  ChannelValues scale(call.type, coefficients.scale);
  ChannelValues shift(call.type, coefficients.shift);
  ForwardArgs args = {};
  memory.attach(call, args);
  args.center = center.buffer().data();
  args.scale = scale.buffer().data();
  args.shift = shift.buffer().data();
  table.normalize(args);
  memory.expect_nothing_else_written();
  return {memory.y().values(), {}, {}, {center.values(), scale.values(), shift.values()}};
}

BlendRule layer_rule(const Shape& shape, double eps) {
  auto weight = uniform(shape.channels, -1, 1, 11);
  auto bias = uniform(shape.channels, -0.5, 0.5, 12);
  weight[0] = 1;
  bias[0] = 0;
  const double divisor = std::max<double>(1, static_cast<double>(shape.values_per_channel() - 1));
  return [=](int64_t channel, double, double m2) {
    const auto c = static_cast<size_t>(channel);
    return ScaleAndShift{weight[c] / std::sqrt(m2 / divisor + eps), bias[c]};
  };
}

BackwardResult run_backward(const KernelTable& table, const BackwardCall& call, const Coefficients& coefficients) {
  const int64_t values = call.shape.values();
  Buffer dy(call.type, call.dy, call.offset);
  const uint64_t dy_before = dy.checksum();
  std::optional<Buffer> x;
  std::optional<Buffer> y;
  std::optional<Buffer> fresh_dx;
  std::optional<Buffer> dresidual;
  if (!call.x.empty()) x.emplace(call.type, call.x, 2 * call.offset);
  if (!call.y.empty()) y.emplace(call.type, call.y, 3 * call.offset);
  if (call.with_dx && !call.in_place) fresh_dx.emplace(call.type, values, call.offset);
  if (call.with_dresidual) dresidual.emplace(call.type, values, 2 * call.offset);
  Buffer* dx = fresh_dx ? &*fresh_dx : call.with_dx ? &dy : nullptr;
  ChannelValues center(call.type, coefficients.center);
  ChannelValues scale(call.type, coefficients.scale);
  Buffer sum_g(Type::kDouble, call.shape.channels);
  Buffer sum_gx(Type::kDouble, call.shape.channels);

  BackwardArgs args = {};
  args.type = call.type;
  args.shape = call.shape;
  args.dy = dy.data();
  args.x = x ? x->data() : nullptr;
  args.y = y ? y->data() : nullptr;
  args.dx = dx ? dx->data() : nullptr;
  args.dresidual = dresidual ? dresidual->data() : nullptr;
  args.scale = scale.buffer().data();
  args.center = center.buffer().data();
  args.sum_g = static_cast<double*>(sum_g.data());
  args.sum_gx = static_cast<double*>(sum_gx.data());
  args.parallel_for = call.parallel_for;
  table.backward(args);

  BackwardResult result = {{{}, {}, sum_g.values(), {}}, {center.values(), scale.values(), coefficients.shift}};
  for (const Buffer* of_channels : {&sum_g, &sum_gx}) EXPECT_TRUE(of_channels->guards_are_intact());
  if (dx != &dy) {
    EXPECT_EQ(dy.checksum(), dy_before) << "dy was changed";
  }
  if (dx) {
    EXPECT_TRUE(dx->guards_are_intact()) << "written beyond dx";
    result.gradients.dx = dx->values();
  }
  if (dresidual) {
    EXPECT_TRUE(dresidual->guards_are_intact()) << "written beyond dresidual";
    result.gradients.dresidual = dresidual->values();
  }
  if (x) {
    result.gradients.sum_gx = sum_gx.values();
  }
  return result;
}

}  // namespace momentum_bn::kernels::test
