// Random layers on random inputs beside the formulas in long double.
//
// MOMENTUM_BN_TEST_SEED gives the seed (printed, so that a failure can be repeated), MOMENTUM_BN_TEST_ITERATIONS the
// number of layers, and ATEN_CPU_CAPABILITY the instruction set, as in all of torch.

#include "formulas.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/util/strides.h>
#include <gtest/gtest.h>
#include <momentum_bn/batch_norm.h>
#include <momentum_bn/modules.h>
#include <torch/autograd.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <iostream>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace momentum_bn {
namespace {

using formulas::Near;

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }
  bool chance(int percent) { return between(1, 100) <= percent; }
  template <typename T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[between(0, static_cast<int64_t>(choices.size()) - 1)];
  }
  /// About normal, variance 1, within +-3.47: a sum of four uniform numbers.
  double noise() {
    uint64_t bits = engine_();
    double sum = -2;
    for (int i = 0; i < 4; ++i, bits >>= 16U) {
      sum += static_cast<double>(bits & 0xffffU) / 65536;
    }
    return sum * std::sqrt(3.0);
  }
  at::Tensor noise(int64_t count, at::ScalarType dtype, double scale = 1, double shift = 0) {
    at::Tensor values = at::empty({count}, at::kDouble);
    double* const data = values.mutable_data_ptr<double>();
    std::generate_n(data, count, [&] { return noise() * scale + shift; });
    return values.to(dtype);
  }

 private:
  std::mt19937_64 engine_;
};

/// A layer of either kind.
struct Subject {
  std::shared_ptr<torch::nn::Module> module;
  NormLayer* norm;
  MomentumBatchNormLayer* momentum;  // or null: a BatchNorm
  std::function<at::Tensor(const at::Tensor&, const at::Tensor&)> forward;
};

template <typename Holder, typename Options>
Subject subject(const Options& options) {
  Holder layer(options);
  MomentumBatchNormLayer* momentum = nullptr;
  if constexpr (std::is_base_of_v<MomentumBatchNormLayer, typename Holder::Impl>) {
    momentum = layer.get();
  }
  return {layer.ptr(), layer.get(), momentum,
          [layer](const at::Tensor& x, const at::Tensor& residual) mutable { return layer->forward(x, residual); }};
}

struct Case {
  bool batch_norm;
  int rank;
  MomentumBatchNormOptions options;  // a BatchNorm's are these with its fixed choices
  at::ScalarType dtype;              // of x
  int threads;
};

Case random_case(Random& random) {
  Case made = {random.chance(20), static_cast<int>(random.between(2, 5)),
               random.chance(2) ? 0 : random.pick<int64_t>({1, 2, 3, 4, 5, 7, 8, 16, 17, 31, 37, 64, 65}),
               random.pick({at::kDouble, at::kFloat, at::kFloat, at::kBFloat16, at::kHalf}), random.pick({1, 1, 2, 3})};
  auto& options = made.options;
  options.dtype(made.dtype == at::kDouble || random.chance(50) ? made.dtype : at::kFloat);
  options.eps(random.pick({1e-5, 1e-3, 0.1}));
  options.momentum(random.pick<std::optional<double>>({1.0, 0.0, 0.3, std::nullopt}));
  options.affine(random.chance(80)).bias(random.chance(80));
  options.track_running_stats(random.chance(85));
  options.total_iters(random.pick<int64_t>({1, 2, 5, 100})).views_per_update(random.pick<int64_t>({1, 2, 2, 3}));
  options.schedule(random.chance(70) ? Schedule::Cosine : Schedule::Constant);
  options.variance(random.pick({Variance::Published, Variance::Unbiased, Variance::Biased}));
  options.activation(random.chance(50) ? Activation::ReLU : Activation::None);
  options.inplace(random.chance(40)).detach_statistics(random.chance(60));
  if (made.batch_norm) {
    options.views_per_update(1).schedule(Schedule::Constant).variance(Variance::Biased).detach_statistics(false);
  }
  return made;
}

Subject build(const Case& from) {
  const auto& o = from.options;
  if (!from.batch_norm) {
    return from.rank <= 3   ? subject<MomentumBatchNorm1d>(o)
           : from.rank == 4 ? subject<MomentumBatchNorm2d>(o)
                            : subject<MomentumBatchNorm3d>(o);
  }
  const auto options = BatchNormOptions(o.num_features())
                           .eps(o.eps())
                           .momentum(o.momentum())
                           .affine(o.affine())
                           .bias(o.bias())
                           .track_running_stats(o.track_running_stats())
                           .activation(o.activation())
                           .inplace(o.inplace())
                           .dtype(o.dtype());
  return from.rank <= 3   ? subject<BatchNorm1d>(options)
         : from.rank == 4 ? subject<BatchNorm2d>(options)
                          : subject<BatchNorm3d>(options);
}

/// Parameters of both signs, some of them frozen, in the middle of a life.
void randomise(Random& random, Subject& layer) {
  const torch::NoGradGuard no_grad;
  for (at::Tensor* const parameter : {&layer.norm->weight, &layer.norm->bias}) {
    if (!parameter->defined()) {
      continue;
    }
    parameter->copy_(random.noise(parameter->numel(), at::kDouble));
    parameter->set_requires_grad(random.chance(70));
  }
  if (!layer.norm->running_mean.defined() || random.chance(30)) {
    return;
  }
  layer.norm->running_mean.copy_(random.noise(layer.norm->running_mean.numel(), at::kDouble));
  layer.norm->running_var.copy_(random.noise(layer.norm->running_var.numel(), at::kDouble).abs() + 0.1);
  if (layer.momentum) {
    layer.momentum->set_cur_iter(random.between(0, 6));
  }
}

int64_t count_of(const std::vector<int64_t>& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
}

/// Of some tensor, over memory of any kind: dense in any order of the dimensions, with gaps, behind an odd address, or
/// with one dimension repeated.
struct View {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  int64_t offset;
  int64_t memory;

  at::Tensor of(const at::Tensor& values) const { return values.as_strided(sizes, strides, offset); }
};

View contiguous_view(const std::vector<int64_t>& sizes) {
  return {sizes, at::IntArrayRef(c10::contiguous_strides(sizes)).vec(), 0, count_of(sizes)};
}

View random_view(Random& random, const std::vector<int64_t>& sizes, bool may_repeat) {
  const auto rank = static_cast<int64_t>(sizes.size());
  std::vector<int64_t> order(sizes.size());  // the outermost first
  std::iota(order.begin(), order.end(), 0);
  const int kind = static_cast<int>(random.between(0, 9));
  if (kind >= 4) {
    std::rotate(order.begin() + 1, order.begin() + 2, order.end());  // channels last
  }
  if (kind >= 8) {
    for (int64_t d = rank - 1; d > 0; --d) {
      std::swap(order[d], order[random.between(0, d)]);
    }
  }
  View view = {sizes, std::vector<int64_t>(sizes.size()), random.chance(30) ? random.between(1, 3) : 0, 0};
  int64_t step = random.chance(15) ? 2 : 1;
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    view.strides[*d] = step;
    step *= std::max<int64_t>(sizes[*d], 1);
    if (random.chance(5)) {
      step += random.between(1, 3);
    }
  }
  view.memory = view.offset + step;
  if (may_repeat && random.chance(10)) {
    view.strides[random.between(0, rank - 1)] = 0;
  }
  return view;
}

/// Most are small; those of some 16 thousand values and more are shared among threads.
std::vector<int64_t> random_sizes(Random& random, const Case& from) {
  std::vector<int64_t> sizes = {random.pick<int64_t>({1, 2, 2, 3, 4, 9, 32}), from.options.num_features()};
  while (static_cast<int>(sizes.size()) < from.rank) {
    sizes.push_back(random.pick<int64_t>({1, 2, 3, 5, 8, 14, 17, from.rank == 3 ? 70 : 4}));
  }
  if (random.chance(3)) {
    sizes[random.pick<size_t>({0, sizes.size() - 1})] = 0;
  }
  sizes[1] = from.options.num_features();
  const int64_t most = random.chance(1) ? 40'000 : 1'000;
  for (size_t d = 0; count_of(sizes) > most; d = (d + 1) % sizes.size()) {
    if (d != 1) {
      sizes[d] = (sizes[d] + 1) / 2;
    }
  }
  return sizes;
}

std::vector<double> values_of(const at::Tensor& tensor) {
  if (!tensor.defined()) {
    return {};
  }
  const at::Tensor values = tensor.detach().to(at::kDouble).contiguous();
  const auto* const data = values.const_data_ptr<double>();
  return {data, data + values.numel()};
}

/// Half the spacing of a type's numbers, relative to them, and of those nearest to zero.
struct Rounding {
  double relative;
  double absolute;
  double largest;
};

Rounding rounding(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return {std::ldexp(1, -53), 0, std::numeric_limits<double>::max()};
    case at::kFloat:
      return {std::ldexp(1, -24), std::ldexp(1, -149), std::numeric_limits<float>::max()};
    case at::kBFloat16:
      return {std::ldexp(1, -8), std::ldexp(1, -133), std::numeric_limits<float>::max()};
    default:
      return {std::ldexp(1, -11), std::ldexp(1, -25), 65504};
  }
}

void check_close(const char* what, const at::Tensor& tensor, const Near& expected) {
  const std::vector<double> values = values_of(tensor);
  TORCH_CHECK(values.size() == expected.value.size(), what, " has ", values.size(), " values");
  const Rounding type = rounding(tensor.scalar_type());
  for (size_t i = 0; i < values.size(); ++i) {
    const double limit = expected.tolerance[i] + type.relative * std::abs(expected.value[i]) + type.absolute;
    // What float16 cannot hold is infinite.
    const double value = std::isinf(values[i]) ? std::copysign(type.largest, values[i]) : values[i];
    const double wanted = std::clamp(expected.value[i], -type.largest, type.largest);
    TORCH_CHECK(std::abs(value - wanted) <= limit, what, "[", i, "] is ", value, ", not ", wanted, " within ", limit);
  }
}

void check_same(const char* what, int64_t value, int64_t expected) {
  TORCH_CHECK(value == expected, what, " is ", value, ", not ", expected);
}

/// A call of a layer.
struct Forward {
  bool training;
  bool grad;
  bool x_grad;  // and the residual's
  View view;    // of x
  at::Tensor source;
  at::Tensor residual;
};

/// A layer beside the formulas.
class Trial {
 public:
  explicit Trial(uint64_t seed) : random_(seed), case_(random_case(random_)), layer_(build(case_)) {
    randomise(random_, layer_);
  }

  /// @return the number of forwards
  int64_t run() {
    at::set_num_threads(case_.threads);
    const int64_t forwards = random_.between(1, 4);
    for (int64_t i = 0; i < forwards; ++i) {
      draw_forward();
      check_forward();
    }
    return forwards;
  }

  /// Of the layer and its last forward.
  std::string describe() const {
    std::ostringstream text;
    text << *layer_.module << " on x of " << last_.view.sizes << ", strides " << last_.view.strides << ", offset "
         << last_.view.offset << ", " << case_.dtype << (last_.training ? ", training" : ", evaluation")
         << (last_.grad ? ", with gradients" : "") << (last_.x_grad ? ", also of x" : "")
         << (last_.residual.defined() ? ", with a residual" : "") << ", on " << case_.threads << " threads";
    return text.str();
  }

 private:
  bool tracks() const { return case_.options.track_running_stats(); }
  bool relu() const { return case_.options.activation() == Activation::ReLU; }
  bool inplace() const { return case_.options.inplace(); }
  bool by_batch() const { return last_.training || !tracks(); }

  void draw_forward() {
    const auto sizes = random_sizes(random_, case_);
    last_.training = random_.chance(85);
    last_.grad = random_.chance(60);
    last_.x_grad = random_.chance(70);
    // In evaluation at::batch_norm's backward pass misreads strides of no memory format, where some sizes are 1.
    last_.view = last_.grad && !by_batch() ? contiguous_view(sizes) : random_view(random_, sizes, !inplace());
    const double scale = random_.pick({1.0, 1.0, 1.0, 0.1, 20.0, 0.0});
    const double shift = random_.pick({0.0, 0.0, 1.0, -30.0});
    last_.source = random_.noise(last_.view.memory, case_.dtype, scale, shift);
    last_.source.set_requires_grad(last_.x_grad && last_.grad);
    last_.residual = at::Tensor();
    if (!random_.chance(30)) {
      return;
    }
    const View view = random_view(random_, sizes, /*may_repeat=*/true);
    last_.residual = view.of(random_.noise(view.memory, case_.dtype)).set_requires_grad(last_.x_grad);
  }

  void check_forward() {
    layer_.module->train(last_.training);
    const at::AutoGradMode mode(last_.grad);
    // What may be overwritten must be neither a leaf nor a view of one.
    const at::Tensor memory = inplace() && last_.grad ? last_.source * 1 : last_.source;
    const at::Tensor before = memory.detach().clone();
    const at::Tensor x = last_.view.of(memory);
    const formulas::Inputs inputs = inputs_of(x);
    formulas::State state = read_state();
    if (by_batch() && !inputs.x.empty() && inputs.shape.values_per_channel() == 1) {
      check_refused(x);
      return check_state(state);
    }
    const auto by = normalisers(inputs, state);
    const at::Tensor y = layer_.forward(x, last_.residual);
    const Near expected = formulas::output(inputs, precision(), by);
    check_close("y", y, expected);
    check_state(state);
    check_memory(before, memory, x, y);
    // Without channels evaluation is a copy, which no parameter is connected with.
    if (y.requires_grad() && (by_batch() || x.size(1) > 0)) {
      check_gradients(inputs, by, x, y, expected);
    }
  }

  formulas::Inputs inputs_of(const at::Tensor& x) const {
    const int64_t planes = x.size(0) * x.size(1);
    return {{x.size(0), x.size(1), planes == 0 ? 0 : x.numel() / planes},
            values_of(x),
            values_of(last_.residual),
            values_of(layer_.norm->weight),
            values_of(layer_.norm->bias),
            case_.options.eps(),
            relu()};
  }

  /// A sum of products may lose some bits of the type that a layer computes in; float32 keeps the mean in two numbers.
  formulas::Precision precision() const {
    formulas::Precision precision = {std::ldexp(1, -48), std::ldexp(1, -52)};
    if (case_.dtype != at::kDouble) {
      precision = {std::ldexp(1, -20), 1e-12};
    }
    if (by_batch()) {
      return precision;
    }
    // at::batch_norm computes x * a + b in the input's own precision, and rounds what the residual is added to.
    precision.intermediate = rounding(case_.dtype).relative;
    precision.relative += 2 * precision.intermediate;
    precision.centering = precision.relative;
    return precision;
  }

  formulas::State read_state() const {
    formulas::State state;
    if (layer_.momentum) {
      state.momentum = layer_.momentum->momentum();
      state.cur_iter = layer_.momentum->cur_iter();
    }
    if (!tracks()) {
      return state;
    }
    const auto read = [&](Near& of, const at::Tensor& buffer) {
      of = Near(static_cast<size_t>(case_.options.num_features()));
      if (buffer.defined()) {
        of.value = values_of(buffer);
      }
    };
    read(state.running_mean, layer_.norm->running_mean);
    read(state.running_var, layer_.norm->running_var);
    read(state.view_mean_sum, layer_.momentum ? layer_.momentum->view_mean_sum : at::Tensor());
    read(state.view_var_sum, layer_.momentum ? layer_.momentum->view_var_sum : at::Tensor());
    state.num_batches_tracked = layer_.norm->num_batches_tracked.item<int64_t>();
    if (!layer_.momentum) {
      state.cur_iter = state.num_batches_tracked;
    }
    state.view_count = layer_.momentum ? layer_.momentum->view_count.item<int64_t>() : 0;
    return state;
  }

  void check_state(const formulas::State& expected) const {
    const formulas::State now = read_state();
    TORCH_CHECK(now.momentum.has_value() == expected.momentum.has_value() &&
                    std::abs(now.momentum.value_or(0) - expected.momentum.value_or(0)) < 1e-15,
                "momentum is ", now.momentum.value_or(-1), ", not ", expected.momentum.value_or(-1));
    check_same("num_batches_tracked", now.num_batches_tracked, expected.num_batches_tracked);
    if (layer_.momentum) {
      check_same("cur_iter", now.cur_iter, expected.cur_iter);
      check_same("view_count", now.view_count, expected.view_count);
    }
    if (!tracks()) {
      return;
    }
    check_close("running_mean", layer_.norm->running_mean, expected.running_mean);
    check_close("running_var", layer_.norm->running_var, expected.running_var);
    if (!layer_.momentum) {
      return;
    }
    check_close("view_mean_sum", layer_.momentum->view_mean_sum, expected.view_mean_sum);
    check_close("view_var_sum", layer_.momentum->view_var_sum, expected.view_var_sum);
  }

  /// What normalises each channel. Changes `state` as a training forward does.
  std::vector<formulas::Normaliser> normalisers(const formulas::Inputs& inputs, formulas::State& state) const {
    const auto& options = case_.options;
    std::vector<formulas::Normaliser> result;
    if (inputs.x.empty()) {
      result.resize(static_cast<size_t>(inputs.shape.channels), {.mean = 0, .deviation = 1});
      return result;
    }
    if (!by_batch()) {
      for (size_t c = 0; c < state.running_mean.value.size(); ++c) {
        result.push_back({state.running_mean.value[c], std::sqrt(state.running_var.value[c] + options.eps())});
      }
      return result;
    }
    const double n = inputs.shape.values_per_channel();
    const std::string variance = to_word(options.variance());
    const double update_weight = layer_.momentum
                                     ? state.momentum.value_or(1.0 / static_cast<double>(state.cur_iter + 1))
                                     : options.momentum().value_or(1.0 / static_cast<double>(state.cur_iter + 1));
    const double m = tracks() && layer_.momentum ? update_weight : 1;
    const double factor = formulas::factor_to_normalise(n, variance);
    const double d = options.detach_statistics() ? 0 : 1;
    const auto batch = formulas::batch_statistics(inputs.shape, inputs.x);
    for (size_t c = 0; c < batch.mean.size(); ++c) {
      const long double kept_mean = m == 1 ? 0 : state.running_mean.value[c];
      const long double kept_var = m == 1 ? 0 : state.running_var.value[c];
      const long double var = m * batch.var[c] * factor + (1 - m) * kept_var;
      result.push_back({m * batch.mean[c] + (1 - m) * kept_mean, std::sqrt(var + options.eps()), batch.mean[c],
                        std::sqrt(batch.var[c]), d * m / n, d * m * factor / (n - 1)});
    }
    if (!tracks()) {
      return result;
    }
    const int64_t updates = state.cur_iter;
    formulas::update(state, batch, n, update_weight, precision(), options.views_per_update(), variance);
    if (state.cur_iter > updates && options.schedule() == Schedule::Cosine && state.momentum) {
      state.momentum = formulas::cosine_schedule(state.cur_iter, options.total_iters());
    }
    return result;
  }

  void check_refused(const at::Tensor& x) {
    try {
      layer_.forward(x, last_.residual);
    } catch (const c10::ValueError&) {
      return;
    }
    TORCH_CHECK(false, "one value per channel was not refused");
  }

  /// Of the output's strides, and of what may and may not be written to.
  /// @param before  what `memory` held, which x is a view of
  void check_memory(const at::Tensor& before, const at::Tensor& memory, const at::Tensor& x,
                    const at::Tensor& y) const {
    const auto wants = [&](const at::Tensor& tensor) {
      return last_.grad && tensor.defined() && tensor.requires_grad();
    };
    const at::Tensor& weight = layer_.norm->weight;
    const bool any = wants(x) || wants(last_.residual) || wants(weight) || wants(layer_.norm->bias);
    const bool depends = by_batch() || x.size(1) > 0;
    TORCH_CHECK(!depends || y.requires_grad() == any, "y.requires_grad is ", y.requires_grad());
    TORCH_CHECK(y.scalar_type() == case_.dtype && y.sizes() == x.sizes(), "y is ", y.scalar_type(), y.sizes());
    const bool needed_again = wants(weight) || (any && by_batch() && !case_.options.detach_statistics());
    if (inplace() && !needed_again) {
      TORCH_CHECK(y.is_same(x), "y did not take x's memory");
      last_.view.of(before).copy_(y.detach());
    } else if (by_batch()) {  // in evaluation at::batch_norm chooses them
      const auto wanted = at::empty(x.sizes(), x.options().memory_format(x.suggest_memory_format()));
      TORCH_CHECK(y.strides() == wanted.strides(), "y has strides ", y.strides(), ", not ", wanted.strides());
    }
    TORCH_CHECK(memory.detach().equal(before), "memory beside y was written to");
  }

  /// A gradient of y, with zeros where the activation's mask is chance: where rounding may have put y on the other side
  /// of its kink.
  at::Tensor random_gradient(const formulas::Inputs& inputs, const std::vector<formulas::Normaliser>& by,
                             const Near& expected) {
    const auto& sizes = last_.view.sizes;
    const View view = by_batch() ? random_view(random_, sizes, /*may_repeat=*/true) : contiguous_view(sizes);
    const at::Tensor dy = view.of(random_.noise(view.memory, case_.dtype));
    if (!relu()) {
      return dy;
    }
    const Rounding type = rounding(case_.dtype);
    std::vector<double> values = values_of(dy);
    bool any_by_chance = false;
    for_outputs(inputs, by, [&](size_t i, double output) {
      if (std::abs(output) > expected.tolerance[i] + type.relative * std::abs(output) + type.absolute) {
        return;
      }
      values[i] = 0;
      any_by_chance = true;
    });
    return any_by_chance ? at::tensor(values, at::kDouble).to(case_.dtype).reshape(sizes) : dy;
  }

  /// run(index, output before the activation) for all values.
  template <typename Run>
  void for_outputs(const formulas::Inputs& inputs, const std::vector<formulas::Normaliser>& by, const Run& run) const {
    const auto arithmetic = precision();
    for (int64_t c = 0; c < inputs.shape.channels; ++c) {
      const formulas::Channel channel(inputs, arithmetic, by[static_cast<size_t>(c)], c);
      inputs.shape.for_channel(c, [&](size_t i) { run(i, static_cast<double>(channel.output(i))); });
    }
  }

  void check_gradients(const formulas::Inputs& inputs, const std::vector<formulas::Normaliser>& by, const at::Tensor& x,
                       const at::Tensor& y, const Near& expected) {
    const at::Tensor dy = random_gradient(inputs, by, expected);
    std::vector<double> g = values_of(dy);
    if (relu()) {
      for_outputs(inputs, by, [&](size_t i, double output) { g[i] = output > 0 ? g[i] : 0; });
    }
    const auto wanted = formulas::gradients(inputs, precision(), by, g);
    struct Gradient {
      const char* name;
      at::Tensor of;
      const Near* wanted;
    };
    const bool overwritten = y.is_same(x);
    std::vector<Gradient> gradients = {{"dx", overwritten ? last_.source : x, &wanted.dx},
                                       {"dresidual", last_.residual, &wanted.dresidual},
                                       {"dweight", layer_.norm->weight, &wanted.dweight},
                                       {"dbias", layer_.norm->bias, &wanted.dbias}};
    std::erase_if(gradients, [](const Gradient& g) { return !g.of.defined() || !g.of.requires_grad(); });
    std::vector<at::Tensor> leaves;
    for (const auto& gradient : gradients) {
      leaves.push_back(gradient.of);
    }
    const auto values = torch::autograd::grad({y}, leaves, {dy});
    for (size_t i = 0; i < gradients.size(); ++i) {
      const bool of_source = overwritten && gradients[i].wanted == &wanted.dx;
      check_close(gradients[i].name, of_source ? last_.view.of(values[i]) : values[i], *gradients[i].wanted);
    }
  }

  Random random_;
  Case case_;
  Subject layer_;
  Forward last_ = {};
};

uint64_t number_of(const char* variable, uint64_t otherwise) {
  const char* const text = std::getenv(variable);
  return text ? std::stoull(text) : otherwise;
}

TEST(Differential, RandomLayersEqualTheFormulas) {
  const auto now = static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count());
  const uint64_t first = number_of("MOMENTUM_BN_TEST_SEED", now % 1'000'000'000);
  const uint64_t layers = number_of("MOMENTUM_BN_TEST_ITERATIONS", 5'000);
  std::string capability = at::get_cpu_capability();
  std::transform(capability.begin(), capability.end(), capability.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  const auto repeat = [&](uint64_t seed, uint64_t count) {
    return "ATEN_CPU_CAPABILITY=" + capability + " MOMENTUM_BN_TEST_SEED=" + std::to_string(seed) +
           " MOMENTUM_BN_TEST_ITERATIONS=" + std::to_string(count);
  };
  std::cout << repeat(first, layers) << std::endl;
  const int threads = at::get_num_threads();
  int64_t forwards = 0;
  for (uint64_t seed = first; seed < first + layers && !HasFailure(); ++seed) {
    Trial trial(seed);
    try {
      forwards += trial.run();
    } catch (const c10::Error& error) {
      ADD_FAILURE() << repeat(seed, 1) << " repeats this: " << trial.describe() << ": "
                    << error.what_without_backtrace();
    }
  }
  at::set_num_threads(threads);
  std::cout << forwards << " forwards" << std::endl;
}

}  // namespace
}  // namespace momentum_bn
