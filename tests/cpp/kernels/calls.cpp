#include "calls.h"

#include "compare.h"
#include "inputs.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>

namespace momentum_bn::kernels::test {
namespace {

/// The tensors of one forward call.
struct ForwardMemory {
  explicit ForwardMemory(const ForwardCall& call) : x(call.type, call.x, call.offset), x_before(x.checksum()) {
    if (!call.residual.empty()) {
      residual.emplace(call.type, call.residual, 2 * call.offset);
      residual_before = residual->checksum();
    }
    if (!call.in_place) {
      fresh.emplace(call.type, call.shape.values(), 3 * call.offset);
    }
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

/// A layer's arrays of channels. Its running statistics begin so far away, and take so much of each batch, that a
/// channel which is blended twice shows.
struct LayerMemory {
  static constexpr double kRunning = 0x1p20;
  static constexpr double kUpdateWeight = 0.5;

  LayerMemory(Type type, const BlendRule& rule)
      : weight(accumulate_type(type), rule.weight),
        bias(accumulate_type(type), rule.bias),
        running_mean(accumulate_type(type), std::vector<double>(rule.weight.size(), kRunning)),
        running_var(accumulate_type(type), std::vector<double>(rule.weight.size(), kRunning)),
        saved(accumulate_type(type), kSavedRows * static_cast<int64_t>(rule.weight.size())),
        mean(Type::kDouble, static_cast<int64_t>(rule.weight.size())),
        m2(Type::kDouble, static_cast<int64_t>(rule.weight.size())) {
    blend.values_per_channel = rule.count;
    blend.options.eps = rule.eps;
    blend.options.variance = Variance::Unbiased;
    blend.batch_weight = 1;
    blend.update_weight = kUpdateWeight;
    blend.views = 1;
    blend.completes_update = true;
    blend.running_mean = running_mean.data();
    blend.running_var = running_var.data();
  }

  void attach(ForwardArgs& args) {
    args.weight = weight.data();
    args.bias = bias.data();
    args.saved = saved.data();
    args.saved_rows = kSavedRows;
    args.blend = &blend;
    args.mean = static_cast<double*>(mean.data());
    args.m2 = static_cast<double*>(m2.data());
  }

  void expect_blended_once(Type type) const {
    const auto updated = [&](double batch) { return kUpdateWeight * batch + (1 - kUpdateWeight) * kRunning; };
    std::vector<double> means;
    std::vector<double> vars;
    const auto all_mean = mean.values();
    const auto all_m2 = m2.values();
    const double per_m2 = 1 / (blend.values_per_channel - 1);
    for (size_t c = 0; c < all_mean.size(); ++c) {
      means.push_back(updated(all_mean[c]));
      vars.push_back(updated(all_m2[c] * per_m2));
    }
    EXPECT_TRUE(near(Type::kFloat, running_mean.values(), rounded(accumulate_type(type), means), 0)) << "running mean";
    EXPECT_TRUE(near(Type::kFloat, running_var.values(), rounded(accumulate_type(type), vars), 0)) << "running var";
    for (const Buffer* of_channels : {&running_mean, &running_var, &saved, &mean, &m2}) {
      EXPECT_TRUE(of_channels->guards_are_intact());
    }
  }

  Coefficients coefficients(const BlendRule& rule) const {
    const auto rows = saved.values();
    const size_t channels = rule.weight.size();
    Coefficients result;
    for (size_t c = 0; c < channels; ++c) {
      result.center.push_back(rows[c]);
      result.scale.push_back(rows[2 * channels + c] * rule.weight[c]);
      result.shift.push_back(rule.bias[c] - rows[channels + c] * result.scale[c]);
    }
    return result;
  }

  BlendArgs blend = {};
  Buffer weight;
  Buffer bias;
  Buffer running_mean;
  Buffer running_var;
  Buffer saved;
  Buffer mean;
  Buffer m2;
};

/// Rows of `saved` that lead to these coefficients, without a weight.
std::vector<double> saved_for(const Coefficients& coefficients) {
  std::vector<double> rows = coefficients.center;
  rows.resize(2 * rows.size(), 0);
  rows.insert(rows.end(), coefficients.scale.begin(), coefficients.scale.end());
  return rows;
}

}  // namespace

ScaleAndShift BlendRule::operator()(int64_t channel, double m2) const {
  const auto c = static_cast<size_t>(channel);
  return {weight[c] / std::sqrt(m2 / (count - 1) + eps), bias[c]};
}

BlendRule layer_rule(Type type, const Shape& shape, double eps) {
  auto weight = uniform(shape.channels, -1, 1, 11);
  auto bias = uniform(shape.channels, -0.5, 0.5, 12);
  weight[0] = 1;
  bias[0] = 0;
  const double count = std::max<double>(2, static_cast<double>(shape.values_per_channel()));
  return {eps, count, rounded(accumulate_type(type), weight), rounded(accumulate_type(type), bias)};
}

namespace {

/// Given statistics lie in the layer already.
ForwardResult run_forward(const KernelTable& table, const ForwardCall& call, const BlendRule& rule, LayerMemory& layer,
                          bool statistics_given) {
  ForwardMemory memory(call);
  ForwardArgs args = {};
  memory.attach(call, args);
  layer.attach(args);
  args.statistics_given = statistics_given;
  table.forward(args);
  memory.expect_nothing_else_written();
  layer.expect_blended_once(call.type);
  return {memory.y().values(), layer.mean.values(), layer.m2.values(), layer.coefficients(rule)};
}

}  // namespace

ForwardResult run_forward(const KernelTable& table, const ForwardCall& call, const BlendRule& rule) {
  LayerMemory layer(call.type, rule);
  return run_forward(table, call, rule, layer, false);
}

ForwardResult run_forward_with(const KernelTable& table, const ForwardCall& call, const BlendRule& rule,
                               const std::vector<double>& mean, const std::vector<double>& m2) {
  LayerMemory layer(call.type, rule);
  for (size_t c = 0; c < mean.size(); ++c) {
    layer.mean.set(static_cast<int64_t>(c), mean[c]);
    layer.m2.set(static_cast<int64_t>(c), m2[c]);
  }
  return run_forward(table, call, rule, layer, true);
}

ForwardResult run_statistics(const KernelTable& table, const ForwardCall& call) {
  Buffer x(call.type, call.x, call.offset);
  const uint64_t x_before = x.checksum();
  Buffer mean(Type::kDouble, call.shape.channels);
  Buffer m2(Type::kDouble, call.shape.channels);
  StatisticsArgs args = {};
  args.type = call.type;
  args.shape = call.shape;
  args.x = x.data();
  args.mean = static_cast<double*>(mean.data());
  args.m2 = static_cast<double*>(m2.data());
  args.parallel_for = call.parallel_for;
  table.statistics(args);
  EXPECT_EQ(x.checksum(), x_before) << "x was changed";
  for (const Buffer* of_channels : {&mean, &m2}) {
    EXPECT_TRUE(of_channels->guards_are_intact());
  }
  return {{}, mean.values(), m2.values(), {}};
}

ForwardResult run_normalize(const KernelTable& table, const ForwardCall& call, const Coefficients& coefficients) {
  const Type kept = accumulate_type(call.type);
  auto result = run_normalize(table, call, saved_for(coefficients), {}, coefficients.shift);
  result.coefficients = {rounded(kept, coefficients.center), rounded(kept, coefficients.scale),
                         rounded(kept, coefficients.shift)};
  return result;
}

ForwardResult run_normalize(const KernelTable& table, const ForwardCall& call, const std::vector<double>& saved,
                            const std::vector<double>& weight, const std::vector<double>& bias) {
  ForwardMemory memory(call);
  const Type kept = accumulate_type(call.type);
  Buffer saved_rows(kept, saved);
  const uint64_t saved_before = saved_rows.checksum();
  const Buffer weights(kept, weight);
  const Buffer biases(kept, bias);
  ForwardArgs args = {};
  memory.attach(call, args);
  args.weight = weight.empty() ? nullptr : weights.data();
  args.bias = bias.empty() ? nullptr : biases.data();
  args.saved = saved_rows.data();
  args.saved_rows = kSavedRows;
  table.normalize(args);
  memory.expect_nothing_else_written();
  EXPECT_EQ(saved_rows.checksum(), saved_before) << "saved was changed";
  return {memory.y().values(), {}, {}, {}};
}

std::vector<double> saved_by_forward(const KernelTable& table, const ForwardCall& call, const BlendRule& rule,
                                     int saved_rows) {
  ForwardMemory memory(call);
  Buffer saved(accumulate_type(call.type), saved_rows * call.shape.channels);
  BlendArgs blend = {};
  blend.values_per_channel = rule.count;
  blend.options.eps = rule.eps;
  blend.options.variance = Variance::Biased;
  blend.batch_weight = 1;
  ForwardArgs args = {};
  memory.attach(call, args);
  args.saved = saved.data();
  args.saved_rows = saved_rows;
  args.blend = &blend;
  table.forward(args);
  EXPECT_TRUE(saved.guards_are_intact());
  return saved.values();
}

std::string describe(const BackwardCall& call) {
  std::string text = describe(static_cast<const BackwardInputs&>(call));
  if (call.mask_from_x) {
    text += " from x";
  }
  if (call.gradient != Gradient::kConstantStatistics) {
    text += " through the statistics";
  }
  if (call.gradient == Gradient::kThroughStatisticsInHalves) {
    text += " in halves";
  }
  return text;
}

namespace {

void run(const KernelTable& table, Gradient gradient, const BackwardArgs& args) {
  if (gradient == Gradient::kConstantStatistics) {
    table.backward(args);
  } else if (gradient == Gradient::kThroughStatistics) {
    table.backward_through_statistics(args);
  } else {
    // What the first half must not write it is not given, nor the second what only the first writes.
    BackwardArgs first = args;
    first.dx = nullptr;
    table.gradient_sums(first);
    BackwardArgs second = args;
    second.dweight = nullptr;
    second.dbias = nullptr;
    table.gradient_of_input(second);
  }
}

}  // namespace

BackwardResult run_backward(const KernelTable& table, const BackwardCall& call) {
  const int64_t values = call.shape.values();
  const Type kept = accumulate_type(call.type);
  Buffer dy(call.type, call.dy, call.offset);
  const uint64_t dy_before = dy.checksum();
  std::optional<Buffer> x;
  std::optional<Buffer> y;
  std::optional<Buffer> fresh_dx;
  std::optional<Buffer> dresidual;
  if (!call.x.empty()) {
    x.emplace(call.type, call.x, 2 * call.offset);
  }
  if (!call.y.empty() && !call.mask_from_x) {
    y.emplace(call.type, call.y, 3 * call.offset);
  }
  if (call.with_dx && !call.in_place) {
    fresh_dx.emplace(call.type, values, call.offset);
  }
  if (call.with_dresidual) {
    dresidual.emplace(call.type, values, 2 * call.offset);
  }
  Buffer* dx = fresh_dx ? &*fresh_dx : call.with_dx ? &dy : nullptr;
  const Buffer saved(kept, call.saved);
  const Buffer weight(kept, call.weight);
  const Buffer bias(kept, call.bias);
  Buffer sums(Type::kDouble, 2 * call.shape.channels);
  Buffer dweight(kept, call.shape.channels);
  Buffer dbias(kept, call.shape.channels);

  BackwardArgs args = {};
  args.type = call.type;
  args.shape = call.shape;
  args.dy = dy.data();
  args.x = x ? x->data() : nullptr;
  args.relu = y || call.mask_from_x;
  args.y = y ? y->data() : nullptr;
  args.dx = dx ? dx->data() : nullptr;
  args.dresidual = dresidual ? dresidual->data() : nullptr;
  args.saved = saved.data();
  args.weight = call.weight.empty() ? nullptr : weight.data();
  args.bias = call.bias.empty() ? nullptr : bias.data();
  args.dweight = x ? dweight.data() : nullptr;
  args.dbias = dbias.data();
  args.sums = static_cast<double*>(sums.data());
  args.parallel_for = call.parallel_for;
  run(table, call.gradient, args);

  BackwardResult result = {};
  auto all_sums = sums.values();
  const auto middle = all_sums.begin() + call.shape.channels;
  result.gradients.sum_g.assign(all_sums.begin(), middle);
  if (x) {
    result.gradients.sum_gx.assign(middle, all_sums.end());
    result.dweight = dweight.values();
  }
  result.dbias = dbias.values();
  for (const Buffer* of_channels : {&sums, &dweight, &dbias}) {
    EXPECT_TRUE(of_channels->guards_are_intact());
  }
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
  return result;
}

BackwardResult run_backward(const KernelTable& table, BackwardCall call, const Coefficients& coefficients) {
  call.saved = saved_for(coefficients);
  return run_backward(table, call);
}

}  // namespace momentum_bn::kernels::test
