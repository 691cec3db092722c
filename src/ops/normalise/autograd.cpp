// Gradients: dx = A * dy + B * x + C per channel, with B = C = 0 where the statistics are detached (see
// src/kernels/channel_rules.h for the formula).

#include "ops/normalise/calls.h"
#include "ops/normalise/composite.h"
#include "ops/normalise/inputs.h"
#include "ops/shared/group.h"

#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace momentum_bn::autograd {
namespace {

using ops::MaybeTensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

bool takes_gradient(const MaybeTensor& tensor) { return tensor && tensor->defined() && tensor->requires_grad(); }

at::Tensor tensor_or_none(const MaybeTensor& tensor) { return tensor.value_or(at::Tensor()); }

bool records(const at::Tensor& x, std::initializer_list<const MaybeTensor*> inputs) {
  if (!at::GradMode::is_enabled()) {
    return false;
  }
  return x.requires_grad() ||
         std::any_of(inputs.begin(), inputs.end(), [](const auto* input) { return takes_gradient(*input); });
}

/// A C++ autograd node neither composes with torch.func nor carries forward-mode tangents: there, at:: operations are
/// differentiated instead.
bool needs_composite(const at::Tensor& x, std::initializer_list<const MaybeTensor*> inputs) {
  if (c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode)) {
    return true;
  }
  return torch::autograd::isFwGradDefined(x) || std::any_of(inputs.begin(), inputs.end(), [](const auto* input) {
           return *input && (*input)->defined() && torch::autograd::isFwGradDefined(*input);
         });
}

/// Throws where x may not be overwritten, in torch's own words as far as torch has the same rule.
/// @param needed_again  whether a gradient that is recorded needs x
void check_overwrites(const at::Tensor& x, bool records_graph, bool needed_again) {
  torch::autograd::check_inplace(x, records_graph);
  TORCH_CHECK(!records_graph || !needed_again,
              "x must not be overwritten where weight takes a gradient, or the statistics do: that gradient needs x "
              "again");
}

/// Calls the operator below autograd.
template <typename Call>
Call::Result below_autograd(const Call& call) {
  const at::AutoDispatchBelowAutograd below;
  return ops::call(call);
}

/// Which of its optional inputs a node was given. An absent input has no edge in the graph, and so the edges of those
/// behind it have smaller numbers.
class Inputs {
 public:
  static void save(AutogradContext* ctx, std::initializer_list<const MaybeTensor*> optionals) {
    int64_t given = 0;
    int64_t bit = 1;
    for (const auto* input : optionals) {
      if (*input && (*input)->defined()) {
        given |= bit;
      }
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

/// Whether the backward pass adds up over the ranks of a group.
template <typename Train>
bool backward_asks_group(const Train& call) {
  return !call.options.detach_statistics && call.process_group && ranks_of_process_group(*call.process_group) > 1;
}

/// The composite path is refused where the backward pass asks a group: at:: operations know no collective, and would
/// take the other ranks' statistics for constants.
template <typename Train>
void check_composite(const Train& call) {
  TORCH_CHECK_NOT_IMPLEMENTED(!backward_asks_group(call),
                              "torch.func and forward-mode derivatives through the statistics of a process_group are "
                              "not supported: use autograd's backward pass, process_group=None, or a layer whose "
                              "statistics are detached");
}

/// What a training forward keeps for its backward pass beside weight and `saved`: no more than is needed.
struct Kept {
  bool x;     // where weight takes a gradient, or x itself does and the statistics are not constant
  bool y;     // where the activation's mask does not come from x
  bool bias;  // where it does: x is kept anyway, and no residual was added to it

  template <typename Train>
  static Kept of(const Train& call) {
    const bool has_residual = call.residual && call.residual->defined();
    const bool keeps_x = takes_gradient(call.weight) || (call.x.requires_grad() && !call.options.detach_statistics);
    const bool mask_from_x = call.options.activation && keeps_x && !has_residual;
    return {keeps_x, call.options.activation && !mask_from_x, mask_from_x};
  }
};

/// autograd keeps no inference tensor, but says so only when the forward pass has changed the state.
void check_may_be_kept(const MaybeTensor& tensor, const char* name) {
  TORCH_CHECK(!tensor || !tensor->defined() || !tensor->is_inference(),
              "Inference tensors cannot be saved for backward: ", name,
              " is one. Clone it outside of torch.inference_mode(), or call the layer under torch.no_grad()");
}

template <typename Train>
void check_may_be_kept(const Train& call) {
  const Kept kept = Kept::of(call);
  check_may_be_kept(kept.x ? MaybeTensor(call.x) : std::nullopt, "x");
  check_may_be_kept(call.weight, "weight");
  check_may_be_kept(kept.bias ? call.bias : std::nullopt, "bias");
}

template <typename Train>
void save_for_backward(AutogradContext* ctx, const Train& call, const at::Tensor& y, const at::Tensor& saved) {
  const Kept kept = Kept::of(call);
  ctx->save_for_backward({kept.x ? at::Tensor(call.x) : at::Tensor(), kept.y ? y : at::Tensor(),
                          tensor_or_none(call.weight), kept.bias ? tensor_or_none(call.bias) : at::Tensor(), saved});
  ctx->saved_data["activation"] =
      call.options.activation ? std::optional<std::string>(std::string(*call.options.activation)) : std::nullopt;
  ctx->saved_data["group"] =
      backward_asks_group(call) ? std::optional<std::string>(std::string(*call.process_group)) : std::nullopt;
  Inputs::save(ctx, {&call.residual, &call.weight, &call.bias});
}

/// Whether dx may take dy's memory: dy must be an ordinary tensor to which only the engine's call of this node refers.
bool nobody_else_holds(const at::Tensor& dy) {
  return !at::GradMode::is_enabled() && dy.device().is_cpu() && dy.use_count() == 1 && !at::isTensorSubclassLike(dy) &&
         dy.has_storage() && dy.storage().use_count() == 1 && dy.is_contiguous(dy.suggest_memory_format());
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

/// dx, dweight, dbias and dresidual, as far as output_mask wants them. dy may be overwritten.
Gradients own_gradients(const ops::Backward& call) {
  if (!call.output_mask[0] || !nobody_else_holds(call.dy)) {
    return ops::call(call);
  }
  at::Tensor dx = call.dy;
  const ops::BackwardInplace inplace = {dx,        call.x,     call.y,          call.weight,
                                        call.bias, call.saved, call.activation, call.output_mask};
  auto [dweight, dbias, dresidual] = ops::call(inplace);
  return {dx, dweight, dbias, dresidual};
}

/// The same through the statistics of a group: its ranks' sums are added up in one collective.
Gradients gradients_in_group(const ops::Backward& call, const std::string& group) {
  TORCH_CHECK_NOT_IMPLEMENTED(!records(call.dy, {&call.x, &call.weight}),
                              "a gradient of the gradient through the statistics of a process_group is not supported");
  auto [sums, dweight, dbias, dresidual] = ops::call(ops::as<ops::GradientSums>(call));
  at::Tensor dx;
  // The others wait for this rank's sums, whatever it needs itself.
  const auto of_group = sum_over_group(sums, group);
  if (call.output_mask[0]) {
    const bool masked = dresidual.defined();
    const MaybeTensor none;
    dx = ops::call(ops::GradientOfInput{masked ? dresidual : call.dy, *call.x, masked ? none : call.y, call.weight,
                                        call.bias, call.saved, of_group, masked ? std::nullopt : call.activation});
  }
  return {dx, dweight, dbias, dresidual};
}

/// Gradients of x, residual, weight and bias, in this order.
variable_list gradients(AutogradContext* ctx, const at::Tensor& dy) {
  if (!dy.defined()) {
    return {{}, {}, {}, {}};
  }
  const auto tensors = ctx->get_saved_variables();
  const auto activation = ctx->saved_data["activation"].toOptional<std::string>();
  const auto group = ctx->saved_data["group"].toOptional<std::string>();
  Inputs inputs(ctx);
  const bool residual = inputs.next_needs_gradient();
  const bool weight = inputs.next_needs_gradient();
  const bool bias = inputs.next_needs_gradient();
  // Without an activation the residual's gradient is dy itself; this second reference keeps it from being overwritten.
  const at::Tensor g = residual && !activation ? dy : at::Tensor();
  const MaybeTensor x = tensors[0];
  const MaybeTensor y = tensors[1];
  const MaybeTensor weight_tensor = tensors[2];
  const MaybeTensor bias_tensor = tensors[3];
  const ops::Backward call = {{dy,
                               x,
                               y,
                               weight_tensor,
                               bias_tensor,
                               tensors[4],
                               activation ? ops::MaybeWord(*activation) : std::nullopt,
                               {ctx->needs_input_grad(0), weight, bias, residual && activation.has_value()}}};
  auto [dx, dweight, dbias, dresidual] = group ? gradients_in_group(call, *group) : own_gradients(call);
  return {dx, g.defined() ? g : dresidual, dweight, dbias};
}

// Nodes are given the operator's struct as a whole: autograd takes none of its tensors for inputs but those that stand
// beside it.

struct TrainNode : Function<TrainNode> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& /*x*/, const MaybeTensor& /*residual*/,
                               const MaybeTensor& /*weight*/, const MaybeTensor& /*bias*/,
                               const ops::ForwardTrain& call) {
    auto [y, saved] = below_autograd(call);
    save_for_backward(ctx, call, y, saved);
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

/// An x that was overwritten, as its node may keep it. Where x is a view, autograd makes x a history that holds the
/// node itself: if the node kept x with it, neither would ever go.
at::Tensor keepable(const at::Tensor& x) { return x.is_view() ? x.detach() : x; }

struct TrainInplaceNode : Function<TrainInplaceNode> {
  static at::Tensor forward(AutogradContext* ctx, at::Tensor x, const MaybeTensor& /*residual*/,
                            const MaybeTensor& /*weight*/, const MaybeTensor& /*bias*/,
                            const ops::ForwardTrainInplace& call, SavedResult result) {
    const auto saved = below_autograd(call);
    ctx->mark_dirty({x});
    save_for_backward(ctx, call, keepable(x), saved);
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
                            const MaybeTensor& bias, const ops::ForwardEvalInplace& call) {
    below_autograd(call);
    ctx->mark_dirty({x});
    ctx->save_for_backward(
        {call.activation ? keepable(x) : at::Tensor(), tensor_or_none(weight), call.running_mean, call.running_var});
    ctx->saved_data["eps"] = call.eps;
    Inputs::save(ctx, {&residual, &weight, &bias});
    return x;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    if (!dy[0].defined()) {
      return variable_list(5);
    }
    const auto tensors = ctx->get_saved_variables();
    // A saved-tensor hook may have given back anything.
    if (tensors[0].defined()) {
      check_same(tensors[0], "y", dy[0], "dy");
    }
    check_parameters(dy[0], tensors[1], std::nullopt, tensors[2], tensors[3]);
    Inputs inputs(ctx);
    const bool residual = inputs.next_needs_gradient();
    inputs.next_needs_gradient();  // weight: takes none where x is overwritten
    const bool bias = inputs.next_needs_gradient();
    const auto g = tensors[0].defined() ? at::threshold_backward(dy[0], tensors[0], 0) : dy[0];
    if (g.sym_numel() == 0) {  // torch's BatchNorm asks this before: the operator divides by the number of values
      return {g, residual ? g : at::Tensor(), {}, bias ? at::zeros_like(tensors[2]) : at::Tensor(), {}};
    }
    // The input is read for the weight's gradient alone; g stands in for it.
    auto [dx, _, dbias] = at::native_batch_norm_backward(g, g, tensors[1], tensors[2], tensors[3], {}, {},
                                                         /*train=*/false, ctx->saved_data["eps"].toDouble(),
                                                         {ctx->needs_input_grad(0), false, bias});
    return {dx, residual ? g : at::Tensor(), {}, dbias, {}};
  }
};

struct FunctionalNode : Function<FunctionalNode> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const MaybeTensor& weight,
                               const MaybeTensor& bias, const ops::ForwardFunctional& call) {
    auto [y, b_mean, b_var, saved] = below_autograd(call);
    ctx->save_for_backward({takes_gradient(weight) ? x : at::Tensor(), tensor_or_none(weight), saved});
    Inputs::save(ctx, {&weight, &bias});
    ctx->mark_non_differentiable({b_mean, b_var, saved});
    return {y, b_mean, b_var, saved};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    if (!dy[0].defined()) {
      return variable_list(4);
    }
    const auto tensors = ctx->get_saved_variables();
    Inputs inputs(ctx);
    const bool weight = inputs.next_needs_gradient();
    const bool bias = inputs.next_needs_gradient();
    const MaybeTensor x = tensors[0];
    const MaybeTensor weight_tensor = tensors[1];
    const MaybeTensor none;
    auto [dx, dweight, dbias, _] = own_gradients({{dy[0],
                                                   x,
                                                   none,
                                                   weight_tensor,
                                                   none,
                                                   tensors[2],
                                                   std::nullopt,
                                                   {ctx->needs_input_grad(0), weight, bias, false}}});
    return {dx, dweight, dbias, {}};
  }
};

std::tuple<at::Tensor, at::Tensor> forward_train(const ops::ForwardTrain& call) {
  if (needs_composite(call.x, {&call.residual, &call.weight, &call.bias})) {
    check_composite(call);
    return composite::forward_train(call);
  }
  if (!records(call.x, {&call.residual, &call.weight, &call.bias})) {
    return below_autograd(call);
  }
  check_may_be_kept(call);
  const auto outputs = TrainNode::apply(call.x, call.residual, call.weight, call.bias, call);
  return {outputs[0], outputs[1]};
}

at::Tensor forward_train_(const ops::ForwardTrainInplace& call) {
  if (needs_composite(call.x, {&call.residual, &call.weight, &call.bias})) {
    check_composite(call);
    auto [y, saved] = composite::forward_train(ops::as<ops::ForwardTrain>(call));
    call.x.copy_(y);
    return saved;
  }
  const bool records_graph = records(call.x, {&call.residual, &call.weight, &call.bias});
  check_overwrites(call.x, records_graph, takes_gradient(call.weight) || !call.options.detach_statistics);
  if (!records_graph) {
    return below_autograd(call);
  }
  check_may_be_kept(call);
  at::Tensor saved;
  TrainInplaceNode::apply(call.x, call.residual, call.weight, call.bias, call, SavedResult{&saved});
  return saved;
}

void forward_eval_(const ops::ForwardEvalInplace& call) {
  if (needs_composite(call.x, {&call.residual, &call.weight, &call.bias})) {
    return composite::forward_eval_(call);
  }
  const bool records_graph = records(call.x, {&call.residual, &call.weight, &call.bias});
  check_overwrites(call.x, records_graph, takes_gradient(call.weight));
  if (!records_graph) {
    return below_autograd(call);
  }
  check_may_be_kept(call.weight, "weight");
  EvalInplaceNode::apply(call.x, call.residual, call.weight, call.bias, call);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_functional(const ops::ForwardFunctional& call) {
  if (needs_composite(call.x, {&call.weight, &call.bias, &call.running_mean, &call.running_var})) {
    return composite::forward_functional(call);
  }
  if (!records(call.x, {&call.weight, &call.bias})) {
    return below_autograd(call);
  }
  const auto outputs = FunctionalNode::apply(call.x, call.weight, call.bias, call);
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

/// Where a gradient of the gradient is wanted, at:: operations record it; else the kernels run.
Gradients backward(const ops::Backward& call) {
  const bool composite =
      records(call.dy, {&call.x, &call.weight}) || needs_composite(call.dy, {&call.x, &call.y, &call.weight});
  return composite ? composite::backward(call) : below_autograd(call);
}

template <typename Call>
Call::Result without_derivative(const Call& call) {
  TORCH_CHECK(!records(call.dy, {&call.weight}) && !needs_composite(call.dy, {&call.y, &call.weight}), Call::kName,
              " has no derivative; _backward has");
  return below_autograd(call);
}

}  // namespace

TORCH_LIBRARY_IMPL(momentum_bn, Autograd, m) {
  ops::implement<forward_train, forward_train_, forward_eval_, forward_functional, backward,
                 without_derivative<ops::BackwardInplace>, without_derivative<ops::GradientSums>,
                 without_derivative<ops::GradientOfInput>>(m);
  for (const char* name :
       {"_batch_statistics", "_group_statistics", "_check_input", "_check_parameters", "_advance_schedule_"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());
  }
}

TORCH_LIBRARY_IMPL(momentum_bn, ADInplaceOrView, m) {
  ops::implement<ops::with_version_bumps<ops::ForwardTrain>, ops::with_version_bumps<ops::ForwardTrainInplace>,
                 ops::with_version_bumps<ops::ForwardEvalInplace>, ops::with_version_bumps<ops::BackwardInplace>,
                 ops::with_version_bumps<ops::AdvanceSchedule>>(m);
}

}  // namespace momentum_bn::autograd
