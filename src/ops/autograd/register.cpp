// Gradients. Statistics are detached: dx = dy * weight / std, dweight = sum(dy * xhat), dbias = sum(dy).

#include "ops/checks.h"
#include "ops/composite/formulas.h"
#include "ops/inputs.h"
#include "ops/ops.h"

#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace momentum_bn::autograd {
namespace {

using ops::MaybeTensor;
using ops::MaybeWord;
using ops::Word;
using ops::word_of;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

bool takes_gradient(const MaybeTensor& tensor) { return tensor && tensor->defined() && tensor->requires_grad(); }

at::Tensor tensor_or_none(const MaybeTensor& tensor) { return tensor.value_or(at::Tensor()); }

bool records(const at::Tensor& x, std::initializer_list<const MaybeTensor*> inputs) {
  if (!at::GradMode::is_enabled()) return false;
  if (x.requires_grad()) return true;
  for (const auto* input : inputs) {
    if (takes_gradient(*input)) return true;
  }
  return false;
}

/// An operator that overwrites x, in torch's own words where x may not be overwritten.
void check_overwrites(const at::Tensor& x, const MaybeTensor& weight, bool records_graph) {
  torch::autograd::check_inplace(x, records_graph);
  TORCH_CHECK(!records_graph || !takes_gradient(weight),
              "x must not be overwritten where weight takes a gradient: its gradient needs x again");
}

/// A C++ autograd node neither composes with torch.func nor carries forward-mode tangents: there, at:: operations are
/// differentiated instead.
bool needs_composite(const at::Tensor& x, std::initializer_list<const MaybeTensor*> inputs) {
  if (c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode)) {
    return true;
  }
  if (torch::autograd::isFwGradDefined(x)) return true;
  for (const auto* input : inputs) {
    if (*input && (*input)->defined() && torch::autograd::isFwGradDefined(*input)) return true;
  }
  return false;
}

/// What a layer's forward pass is told beside its tensors. A plain struct: not an input in autograd's sense.
struct TrainArguments {
  State state;
  double eps;
  int64_t total_iters;
  int64_t views_per_update;
  std::string schedule;
  std::string variance;
  std::optional<std::string> activation;
  std::optional<std::string> process_group;
  MaybeTensor group_statistics;
};

/// Which of a node's optional inputs it was given. An absent one has no edge, so shifts those behind it.
class Inputs {
 public:
  static void save(AutogradContext* ctx, std::initializer_list<const MaybeTensor*> optionals) {
    int64_t given = 0;
    int64_t bit = 1;
    for (const auto* input : optionals) {
      if (*input && (*input)->defined()) given |= bit;
      bit <<= 1;
    }
    ctx->saved_data["given"] = given;
  }

  explicit Inputs(AutogradContext* ctx) : ctx_(ctx), given_(ctx->saved_data["given"].toInt()) {}
  /// Whether the next optional input's gradient is wanted.
  bool next_needs_gradient() {
    const bool given = given_ & 1;
    given_ >>= 1;
    return given && ctx_->needs_input_grad(edge_++);
  }

 private:
  AutogradContext* ctx_;
  int64_t given_;
  size_t edge_ = 1;  // behind x
};

/// Saves for the backward pass what its inputs need, and no more: x where weight takes a gradient, y where the
/// activation's mask is needed.
void save_for_backward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& y, const MaybeTensor& residual,
                       const MaybeTensor& weight, const MaybeTensor& bias, const at::Tensor& saved,
                       const std::optional<std::string>& activation) {
  ctx->save_for_backward(
      {takes_gradient(weight) ? x : at::Tensor(), activation ? y : at::Tensor(), tensor_or_none(weight), saved});
  ctx->saved_data["activation"] = activation;
  Inputs::save(ctx, {&residual, &weight, &bias});
}

/// Whether dx may take dy's memory: an ordinary tensor that only the engine's call of this node refers to.
bool nobody_else_holds(const at::Tensor& dy) {
  return !at::GradMode::is_enabled() && dy.device().is_cpu() && dy.use_count() == 1 && !at::isTensorSubclassLike(dy) &&
         dy.has_storage() && dy.storage().use_count() == 1 && dy.is_contiguous(dy.suggest_memory_format());
}

/// Gradients of x, weight, bias and residual, as far as output_mask wants them. dy may be overwritten.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> normalization_gradients(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& y, const at::Tensor& weight, const at::Tensor& saved,
    MaybeWord activation, std::array<bool, 4> output_mask) {
  if (!output_mask[0] || !nobody_else_holds(dy)) {
    return ops::backward(dy, x, y, weight, saved, activation, output_mask);
  }
  at::Tensor dx = dy;
  auto [dweight, dbias, dresidual] = ops::backward_(dx, x, y, weight, saved, activation, output_mask);
  return {dx, dweight, dbias, dresidual};
}

/// Gradients of x, residual, weight and bias, in this order.
variable_list gradients(AutogradContext* ctx, const at::Tensor& dy) {
  if (!dy.defined()) return {{}, {}, {}, {}};
  const auto tensors = ctx->get_saved_variables();
  const auto activation = ctx->saved_data["activation"].toOptional<std::string>();
  Inputs inputs(ctx);
  const bool residual = inputs.next_needs_gradient();
  const bool weight = inputs.next_needs_gradient();
  const bool bias = inputs.next_needs_gradient();
  // Without an activation the residual's gradient is dy itself; this second reference keeps it from being overwritten.
  const at::Tensor g = residual && !activation ? dy : at::Tensor();
  auto [dx, dweight, dbias, dresidual] =
      normalization_gradients(dy, tensors[0], tensors[1], tensors[2], tensors[3], word_of(activation),
                              {ctx->needs_input_grad(0), weight, bias, residual && activation.has_value()});
  if (g.defined()) dresidual = g;
  return {dx, dresidual, dweight, dbias};
}

struct TrainNode : Function<TrainNode> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const MaybeTensor& residual,
                               const MaybeTensor& weight, const MaybeTensor& bias, const TrainArguments& arguments) {
    at::AutoDispatchBelowAutograd below;
    auto [y, saved] =
        ops::forward_train(x, residual, weight, bias, arguments.state.tensors(), arguments.eps, arguments.total_iters,
                           arguments.views_per_update, arguments.schedule, arguments.variance,
                           word_of(arguments.activation), word_of(arguments.process_group), arguments.group_statistics);
    save_for_backward(ctx, x, y, residual, weight, bias, saved, arguments.activation);
    ctx->mark_non_differentiable({saved});
    return {y, saved};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    auto result = gradients(ctx, dy[0]);
    result.emplace_back();
    return result;
  }
};

/// Where an in-place node leaves its second result: as an output of the node it would keep x from being a view.
struct SavedResult {
  at::Tensor* saved;
};

struct TrainInplaceNode : Function<TrainInplaceNode> {
  static at::Tensor forward(AutogradContext* ctx, at::Tensor x, const MaybeTensor& residual, const MaybeTensor& weight,
                            const MaybeTensor& bias, const TrainArguments& arguments, SavedResult result) {
    at::AutoDispatchBelowAutograd below;
    const auto saved = ops::forward_train_(x, residual, weight, bias, arguments.state.tensors(), arguments.eps,
                                           arguments.total_iters, arguments.views_per_update, arguments.schedule,
                                           arguments.variance, word_of(arguments.activation),
                                           word_of(arguments.process_group), arguments.group_statistics);
    ctx->mark_dirty({x});
    save_for_backward(ctx, x, x, residual, weight, bias, saved, arguments.activation);
    *result.saved = saved;
    return x;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    auto result = gradients(ctx, dy[0]);
    result.resize(6);
    return result;
  }
};

/// Evaluation in place: the gradients are those of torch's own BatchNorm, which it replaces bit for bit.
struct EvalInplaceNode : Function<EvalInplaceNode> {
  static at::Tensor forward(AutogradContext* ctx, at::Tensor x, const MaybeTensor& residual, const MaybeTensor& weight,
                            const MaybeTensor& bias, const State& running, double eps,
                            const std::optional<std::string>& activation) {
    at::AutoDispatchBelowAutograd below;
    ops::forward_eval_(x, residual, weight, bias, running.running_mean, running.running_var, eps, word_of(activation));
    ctx->mark_dirty({x});
    ctx->save_for_backward(
        {activation ? x : at::Tensor(), tensor_or_none(weight), running.running_mean, running.running_var});
    ctx->saved_data["eps"] = eps;
    Inputs::save(ctx, {&residual, &weight, &bias});
    return x;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    if (!dy[0].defined()) return variable_list(7);
    const auto tensors = ctx->get_saved_variables();
    Inputs inputs(ctx);
    const bool residual = inputs.next_needs_gradient();
    inputs.next_needs_gradient();  // weight: takes none where x is overwritten
    const bool bias = inputs.next_needs_gradient();
    // A saved-tensor hook may have given back anything.
    if (tensors[0].defined()) {
      check_same(tensors[0], "y", dy[0], "dy");
    }
    check_parameters(dy[0], tensors[1], std::nullopt, tensors[2], tensors[3]);
    const auto g = tensors[0].defined() ? at::threshold_backward(dy[0], tensors[0], 0) : dy[0];
    // The input is read for the weight's gradient alone; g stands in for it.
    auto [dx, _, dbias] = at::native_batch_norm_backward(g, g, tensors[1], tensors[2], tensors[3], {}, {},
                                                         /*train=*/false, ctx->saved_data["eps"].toDouble(),
                                                         {ctx->needs_input_grad(0), false, bias});
    return {dx, residual ? g : at::Tensor(), {}, dbias, {}, {}, {}};
  }
};

struct FunctionalNode : Function<FunctionalNode> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const MaybeTensor& weight,
                               const MaybeTensor& bias, const State& running, double momentum, double eps,
                               const std::string& variance) {
    at::AutoDispatchBelowAutograd below;
    auto [y, b_mean, b_var, saved] =
        ops::forward_functional(x, weight, bias, running.running_mean, running.running_var, momentum, eps, variance);
    ctx->save_for_backward({takes_gradient(weight) ? x : at::Tensor(), tensor_or_none(weight), saved});
    Inputs::save(ctx, {&weight, &bias});
    ctx->mark_non_differentiable({b_mean, b_var, saved});
    return {y, b_mean, b_var, saved};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    if (!dy[0].defined()) return variable_list(7);
    const auto tensors = ctx->get_saved_variables();
    Inputs inputs(ctx);
    const bool weight = inputs.next_needs_gradient();
    const bool bias = inputs.next_needs_gradient();
    auto [dx, dweight, dbias, _] =
        normalization_gradients(dy[0], tensors[0], at::Tensor(), tensors[1], tensors[2], std::nullopt,
                                {ctx->needs_input_grad(0), weight, bias, false});
    return {dx, dweight, dbias, {}, {}, {}, {}};
  }
};

std::optional<std::string> owned(MaybeWord word) {
  return word ? std::optional<std::string>(std::string(*word)) : std::nullopt;
}

std::tuple<at::Tensor, at::Tensor> forward_train(const at::Tensor& x, const MaybeTensor& residual,
                                                 const MaybeTensor& weight, const MaybeTensor& bias,
                                                 at::TensorList state, double eps, int64_t total_iters,
                                                 int64_t views_per_update, Word schedule, Word variance,
                                                 MaybeWord activation, MaybeWord process_group,
                                                 const MaybeTensor& group_statistics) {
  if (needs_composite(x, {&residual, &weight, &bias})) {
    return composite::train_forward(x, residual, weight, bias, State::of(state),
                                    checked_config(eps, total_iters, views_per_update, schedule, variance, activation),
                                    {process_group, group_statistics});
  }
  if (!records(x, {&residual, &weight, &bias})) {
    at::AutoDispatchBelowAutograd below;
    return ops::forward_train(x, residual, weight, bias, state, eps, total_iters, views_per_update, schedule, variance,
                              activation, process_group, group_statistics);
  }
  const auto outputs = TrainNode::apply(
      x, residual, weight, bias,
      TrainArguments{State::of(state), eps, total_iters, views_per_update, std::string(schedule), std::string(variance),
                     owned(activation), owned(process_group), group_statistics});
  return {outputs[0], outputs[1]};
}

at::Tensor forward_train_(at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight,
                          const MaybeTensor& bias, at::TensorList state, double eps, int64_t total_iters,
                          int64_t views_per_update, Word schedule, Word variance, MaybeWord activation,
                          MaybeWord process_group, const MaybeTensor& group_statistics) {
  if (needs_composite(x, {&residual, &weight, &bias})) {
    auto [y, saved] =
        composite::train_forward(x, residual, weight, bias, State::of(state),
                                 checked_config(eps, total_iters, views_per_update, schedule, variance, activation),
                                 {process_group, group_statistics});
    x.copy_(y);
    return saved;
  }
  const bool records_graph = records(x, {&residual, &weight, &bias});
  check_overwrites(x, weight, records_graph);
  if (!records_graph) {
    at::AutoDispatchBelowAutograd below;
    return ops::forward_train_(x, residual, weight, bias, state, eps, total_iters, views_per_update, schedule, variance,
                               activation, process_group, group_statistics);
  }
  at::Tensor saved;
  TrainInplaceNode::apply(
      x, residual, weight, bias,
      TrainArguments{State::of(state), eps, total_iters, views_per_update, std::string(schedule), std::string(variance),
                     owned(activation), owned(process_group), group_statistics},
      SavedResult{&saved});
  return saved;
}

void forward_eval_(at::Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight, const MaybeTensor& bias,
                   const at::Tensor& running_mean, const at::Tensor& running_var, double eps, MaybeWord activation) {
  if (needs_composite(x, {&residual, &weight, &bias})) {
    check_forward_eval(x, residual, weight, bias, running_mean, running_var);
    x.copy_(composite::evaluate(x, residual, weight, bias, running_mean, running_var, eps, activation_of(activation)));
    return;
  }
  const bool records_graph = records(x, {&residual, &weight, &bias});
  check_overwrites(x, weight, records_graph);
  if (!records_graph) {
    at::AutoDispatchBelowAutograd below;
    return ops::forward_eval_(x, residual, weight, bias, running_mean, running_var, eps, activation);
  }
  State running;
  running.running_mean = running_mean;
  running.running_var = running_var;
  EvalInplaceNode::apply(x, residual, weight, bias, running, eps, owned(activation));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_functional(
    const at::Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& running_mean,
    const MaybeTensor& running_var, double momentum, double eps, Word variance) {
  if (needs_composite(x, {&weight, &bias, &running_mean, &running_var})) {
    return composite::functional_forward(x, weight, bias, running_mean, running_var, momentum, eps,
                                         variance_of(variance));
  }
  if (!records(x, {&weight, &bias})) {
    at::AutoDispatchBelowAutograd below;
    return ops::forward_functional(x, weight, bias, running_mean, running_var, momentum, eps, variance);
  }
  State running;
  if (running_mean) running.running_mean = *running_mean;
  if (running_var) running.running_var = *running_var;
  const auto outputs = FunctionalNode::apply(x, weight, bias, running, momentum, eps, std::string(variance));
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

/// Where a gradient of the gradient is wanted, at:: operations record it; else the kernels run.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& dy, const MaybeTensor& x,
                                                                    const MaybeTensor& y, const MaybeTensor& weight,
                                                                    const at::Tensor& saved, MaybeWord activation,
                                                                    std::array<bool, 4> output_mask) {
  if (records(dy, {&x, &weight}) || needs_composite(dy, {&x, &y, &weight})) {
    return composite::normalize_backward(dy, x, y, weight, saved, activation_of(activation), output_mask);
  }
  at::AutoDispatchBelowAutograd below;
  return ops::backward(dy, x, y, weight, saved, activation, output_mask);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_(at::Tensor& dy, const MaybeTensor& x, const MaybeTensor& y,
                                                         const MaybeTensor& weight, const at::Tensor& saved,
                                                         MaybeWord activation, std::array<bool, 4> output_mask) {
  TORCH_CHECK(!records(dy, {&x, &weight}) && !needs_composite(dy, {&x, &y, &weight}),
              "_backward_ has no derivative; _backward has");
  at::AutoDispatchBelowAutograd below;
  return ops::backward_(dy, x, y, weight, saved, activation, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(momentum_bn, Autograd, m) {
  m.impl("_forward_train", forward_train);
  m.impl("_forward_train_", forward_train_);
  m.impl("_forward_eval_", forward_eval_);
  m.impl("_forward_functional", forward_functional);
  m.impl("_backward", backward);
  m.impl("_backward_", backward_);
  m.impl("_batch_statistics", torch::CppFunction::makeFallthrough());
  m.impl("_group_statistics", torch::CppFunction::makeFallthrough());
  m.impl("_check_input", torch::CppFunction::makeFallthrough());
  m.impl("_check_parameters", torch::CppFunction::makeFallthrough());
  m.impl("_advance_schedule_", torch::CppFunction::makeFallthrough());
  m.impl("_teacher_update_", torch::CppFunction::makeFallthrough());
}

}  // namespace momentum_bn::autograd
