// From batch statistics to what is saved and to the state, against float64.

#include "calls.h"
#include "compare.h"
#include "inputs.h"
#include "instruction_sets.h"

#include <cmath>

namespace momentum_bn::kernels::test {
namespace {

/// A layer's arrays of channels, of which any may be left out.
struct Arrays {
  std::vector<double> running_mean;
  std::vector<double> running_var;
  std::vector<double> view_mean_sum;
  std::vector<double> view_var_sum;
};

struct Blend {
  Variance variance = Variance::Published;
  double eps = 1e-5;
  double batch_weight = 1;
  double update_weight = 0;
  int64_t views = 1;
  bool completes_update = false;
  int saved_rows = kSavedRows;
};

struct Blended {
  std::vector<double> saved;  // rows 0 and 1 added up into row 0
  std::vector<double> batch_mean;
  std::vector<double> batch_var;
  Arrays arrays;
};

class BlendTest : public EveryKernel {
 protected:
  Type kept() const { return accumulate_type(type()); }

  Arrays used_arrays(int64_t channels) const {
    return {rounded(kept(), uniform(channels, -0.5, 0.5, 51)), rounded(kept(), uniform(channels, 0.5, 2, 52)),
            rounded(kept(), uniform(channels, -0.5, 0.5, 53)), rounded(kept(), uniform(channels, 0.5, 2, 54))};
  }

  ForwardCall call_of(const Shape& shape) const { return {forward_inputs(type(), shape, 0.3)}; }

  Blended run(const ForwardCall& call, const Blend& blend, const Arrays& before) const {
    const int64_t channels = call.shape.channels;
    const Buffer x(call.type, call.x);
    Buffer y(call.type, call.shape.values());
    Buffer saved(kept(), blend.saved_rows * channels);
    Buffer batch_mean(kept(), channels);
    Buffer batch_var(kept(), channels);
    Buffer running_mean(kept(), before.running_mean);
    Buffer running_var(kept(), before.running_var);
    Buffer view_mean_sum(kept(), before.view_mean_sum);
    Buffer view_var_sum(kept(), before.view_var_sum);
    const auto or_null = [](Buffer& buffer, const std::vector<double>& values) {
      return values.empty() ? nullptr : buffer.data();
    };
    BlendArgs blend_args = {};
    blend_args.values_per_channel = static_cast<double>(call.shape.values_per_channel());
    blend_args.options.eps = blend.eps;
    blend_args.options.variance = blend.variance;
    blend_args.batch_weight = blend.batch_weight;
    blend_args.update_weight = blend.update_weight;
    blend_args.views = static_cast<double>(blend.views);
    blend_args.completes_update = blend.completes_update;
    blend_args.running_mean = or_null(running_mean, before.running_mean);
    blend_args.running_var = or_null(running_var, before.running_var);
    blend_args.view_mean_sum = or_null(view_mean_sum, before.view_mean_sum);
    blend_args.view_var_sum = or_null(view_var_sum, before.view_var_sum);
    blend_args.batch_mean = batch_mean.data();
    blend_args.batch_var = batch_var.data();
    ForwardArgs args = {};
    args.type = call.type;
    args.shape = call.shape;
    args.x = x.data();
    args.y = y.data();
    args.saved = saved.data();
    args.saved_rows = blend.saved_rows;
    args.blend = &blend_args;
    args.parallel_for = call.parallel_for;
    table().forward(args);
    for (const Buffer* buffer :
         {&y, &saved, &batch_mean, &batch_var, &running_mean, &running_var, &view_mean_sum, &view_var_sum}) {
      EXPECT_TRUE(buffer->guards_are_intact());
    }
    Blended result = {saved.values(),
                      batch_mean.values(),
                      batch_var.values(),
                      {running_mean.values(), running_var.values(), view_mean_sum.values(), view_var_sum.values()}};
    for (size_t c = 0; c < static_cast<size_t>(channels); ++c) {
      result.saved[c] += result.saved[static_cast<size_t>(channels) + c];
      result.saved[static_cast<size_t>(channels) + c] = 0;
    }
    return result;
  }

  Blended expected(const ForwardCall& call, const Blend& blend, Arrays arrays) const {
    const auto channels = static_cast<size_t>(call.shape.channels);
    const auto n = static_cast<double>(call.shape.values_per_channel());
    const auto exact = statistics(call.shape, call.x);
    Blended result = {std::vector<double>(static_cast<size_t>(blend.saved_rows) * channels), {}, {}, {}};
    // Of the batch's biased variance.
    const double c_norm = blend.variance == Variance::Published  ? n / (n - 1) * n / (n - 1)
                          : blend.variance == Variance::Unbiased ? n / (n - 1)
                                                                 : 1;
    const double run = blend.variance == Variance::Published ? n / (n - 1) : 1;
    for (size_t c = 0; c < channels; ++c) {
      const double var = exact.m2[c] / (n - 1);
      result.batch_mean.push_back(exact.mean[c]);
      result.batch_var.push_back(var);
      double mean = exact.mean[c];
      double norm_var = exact.m2[c] / n * c_norm;
      double m = 1;
      if (!arrays.running_mean.empty() && blend.batch_weight != 1) {
        m = blend.batch_weight;
        mean = m * mean + (1 - m) * arrays.running_mean[c];
        norm_var = m * norm_var + (1 - m) * arrays.running_var[c];
      }
      result.saved[c] = mean;
      result.saved[2 * channels + c] = 1 / std::sqrt(norm_var + blend.eps);
      if (blend.saved_rows == kSavedRowsThroughStatistics) {
        result.saved[3 * channels + c] = mean - exact.mean[c];
        result.saved[4 * channels + c] = m / n;
        result.saved[5 * channels + c] = m * c_norm / n;
      }
      double of_mean = exact.mean[c];
      double of_var = var;
      if (!arrays.view_mean_sum.empty()) {
        of_mean = (arrays.view_mean_sum[c] += of_mean) / static_cast<double>(blend.views);
        of_var = (arrays.view_var_sum[c] += of_var) / static_cast<double>(blend.views);
        if (blend.completes_update) {
          arrays.view_mean_sum[c] = arrays.view_var_sum[c] = 0;
        }
      }
      if (!arrays.running_mean.empty() && blend.completes_update) {
        const double w = blend.update_weight;
        arrays.running_mean[c] = w * of_mean + (1 - w) * arrays.running_mean[c];
        arrays.running_var[c] = w * of_var * run + (1 - w) * arrays.running_var[c];
      }
    }
    result.arrays = arrays;
    return result;
  }

  void check(const ForwardCall& call, const Blend& blend, const Arrays& before) const {
    const auto result = run(call, blend, before);
    const auto exact = expected(call, blend, before);
    const double tolerance = type() == Type::kDouble ? 1e-12 : 2e-6;
    const auto is_near = [&](const std::vector<double>& values, const std::vector<double>& of_exact) {
      return near(Type::kDouble, values, of_exact, tolerance);
    };
    EXPECT_TRUE(is_near(result.saved, exact.saved)) << "saved";
    EXPECT_TRUE(is_near(result.batch_mean, exact.batch_mean)) << "batch_mean";
    EXPECT_TRUE(is_near(result.batch_var, exact.batch_var)) << "batch_var";
    EXPECT_TRUE(is_near(result.arrays.running_mean, exact.arrays.running_mean)) << "running_mean";
    EXPECT_TRUE(is_near(result.arrays.running_var, exact.arrays.running_var)) << "running_var";
    EXPECT_TRUE(is_near(result.arrays.view_mean_sum, exact.arrays.view_mean_sum)) << "view_mean_sum";
    EXPECT_TRUE(is_near(result.arrays.view_var_sum, exact.arrays.view_var_sum)) << "view_var_sum";
  }

  /// Each way through the kernels, and a number of channels that a thread blends in several parts.
  const std::vector<Shape> shapes_ = {{33, 5, 1},  {67, 1030, 1}, {1571, 64, 1},
                                      {33, 37, 4}, {33, 3, 257},  {2, 37, 784}};
};

TEST_P(BlendTest, EveryVarianceAndUpdate) {
  for (const Shape& shape : shapes_) {
    const auto call = call_of(shape);
    for (const Variance variance : {Variance::Published, Variance::Unbiased, Variance::Biased}) {
      for (int flags = 0; flags < 16; ++flags) {
        auto before = used_arrays(shape.channels);
        if (flags & 1) {
          before.view_mean_sum = before.view_var_sum = {};
        }
        Blend blend;
        blend.variance = variance;
        blend.completes_update = flags & 2;
        blend.batch_weight = flags & 4 ? 1 : 0.7;
        blend.saved_rows = flags & 8 ? kSavedRowsThroughStatistics : kSavedRows;
        blend.update_weight = 0.1;
        blend.views = flags & 1 ? 1 : 3;
        SCOPED_TRACE(name_of(shape) + " variance " + std::to_string(static_cast<int>(variance)) + " flags " +
                     std::to_string(flags));
        check(call, blend, before);
      }
    }
  }
}

TEST_P(BlendTest, WithoutRunningStatistics) {
  for (const Shape& shape : shapes_) {
    for (const int rows : {kSavedRows, kSavedRowsThroughStatistics}) {
      Blend blend;
      blend.saved_rows = rows;
      blend.batch_weight = 0.3;  // of nothing
      SCOPED_TRACE(name_of(shape));
      check(call_of(shape), blend, {});
    }
  }
}

/// A batch that normalises alone is not spoilt by running statistics that are.
TEST_P(BlendTest, BatchOfWeightOneReadsNoRunningStatistics) {
  for (const Shape& shape : shapes_) {
    auto before = used_arrays(shape.channels);
    before.view_mean_sum = before.view_var_sum = {};
    for (size_t c = 0; c < before.running_mean.size(); ++c) {
      before.running_mean[c] = c % 2 ? kNaN : kInfinity;
      before.running_var[c] = c % 2 ? kInfinity : kNaN;
    }
    Blend blend;
    blend.completes_update = true;
    blend.update_weight = 0.1;
    SCOPED_TRACE(name_of(shape));
    check(call_of(shape), blend, before);
  }
}

/// As the processes of a group do it: the same bits from statistics that are given.
TEST_P(BlendTest, GivenStatistics) {
  for (const Shape& shape : layouts()) {
    auto call = call_of(shape);
    call.relu = true;
    SCOPED_TRACE(name_of(shape));
    const auto rule = layer_rule(type(), shape);
    const auto own = run_forward(table(), call, rule);
    EXPECT_TRUE(run_forward_with(table(), call, rule, own.mean, own.m2).y == own.y);
  }
}

/// A process without values still takes part in the state.
TEST_P(BlendTest, GivenStatisticsWithoutValues) {
  ForwardCall call;
  call.type = type();
  call.shape = {0, 5, 1};
  const auto mean = uniform(5, -1, 1, 61);
  const auto m2 = uniform(5, 1, 2, 62);
  EXPECT_TRUE(run_forward_with(table(), call, layer_rule(type(), {9, 5, 1}), mean, m2).y.empty());
}

MOMENTUM_BN_FOR_EVERY_KERNEL(BlendTest);

}  // namespace
}  // namespace momentum_bn::kernels::test
