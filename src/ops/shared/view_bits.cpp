// Views with the conjugate or the negative bit, such as z.conj().imag, into operators that change their arguments.
//
// torch's own fallback for such views takes it that an operator returns first what it changed. These return other
// results, or none, and it would then read past the end of the stack.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <utility>
#include <vector>

namespace momentum_bn {
namespace {

/// A view, and the ordinary tensor that an operator is given in its place.
using Replaced = std::pair<at::Tensor, at::Tensor>;

void resolve_bits(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  std::vector<Replaced> changed;
  const auto resolved = [&](const at::Tensor& tensor, bool is_written) {
    if (!tensor.defined() || !(tensor.is_neg() || tensor.is_conj())) {
      return tensor;
    }
    const at::Tensor ordinary = tensor.resolve_conj().resolve_neg();
    if (is_written) {
      changed.emplace_back(tensor, ordinary);
    }
    return ordinary;
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& argument = (*stack)[first + i];
    const bool is_written = arguments[i].alias_info() && arguments[i].alias_info()->isWrite();
    if (argument.isTensor()) {
      argument = resolved(argument.toTensor(), is_written);
    } else if (argument.isTensorList()) {
      std::vector<at::Tensor> tensors;
      for (const at::Tensor& tensor : argument.toTensorVector()) {
        tensors.push_back(resolved(tensor, is_written));
      }
      argument = std::move(tensors);
    }
  }
  op.callBoxed(stack);
  for (const auto& [view, ordinary] : changed) {
    view.copy_(ordinary);
  }
}

void resolve_bits_of_operators(torch::Library& m) {
  for (const char* name : {"_forward_train", "_forward_train_", "_forward_eval_", "_backward_", "_advance_schedule_",
                           "_teacher_update_"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&resolve_bits>());
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(momentum_bn, Conjugate, m) { resolve_bits_of_operators(m); }
TORCH_LIBRARY_IMPL(momentum_bn, Negative, m) { resolve_bits_of_operators(m); }

}  // namespace momentum_bn
