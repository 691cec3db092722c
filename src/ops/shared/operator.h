#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

// An operator is described once in C++, by the struct of its arguments:
//
//     struct AddCall {
//       static constexpr const char* kName = "momentum_bn::_add";
//       using Result = at::Tensor;
//       const at::Tensor& x;
//       double by;
//       auto fields() const { return std::tie(x, by); }
//     };
//
// fields() has the arguments in the order of the schema. The functions here make such structs of the dispatcher's
// arguments, and hand their fields to the dispatcher, so that an argument that is only handed on is named nowhere else.

namespace momentum_bn::ops {

using MaybeTensor = std::optional<at::Tensor>;
using Word = std::string_view;
using MaybeWord = std::optional<std::string_view>;

namespace internal {

/// How the dispatcher passes a field: tensors by reference, all else by value.
template <typename Field>
using Argument = std::conditional_t<std::is_same_v<std::remove_cvref_t<Field>, at::Tensor> ||
                                        std::is_same_v<std::remove_cvref_t<Field>, MaybeTensor>,
                                    Field, std::remove_cvref_t<Field>>;

template <typename Call, typename Fields>
struct FunctionOf;

template <typename Call, typename... Fields>
struct FunctionOf<Call, std::tuple<Fields...>> {
  using Type = Call::Result(Argument<Fields>...);

  template <auto kBody>
  static Call::Result run(Argument<Fields>... arguments) {
    return kBody(Call{arguments...});
  }
};

template <typename Call>
using Function = FunctionOf<Call, decltype(std::declval<const Call&>().fields())>;

template <typename Result, typename Call>
Call call_of(Result (*)(const Call&));

template <typename Call>
const c10::TypedOperatorHandle<typename Function<Call>::Type>& handle() {
  static const auto found =
      c10::Dispatcher::singleton().findSchemaOrThrow(Call::kName, "").template typed<typename Function<Call>::Type>();
  return found;
}

template <auto kBody>
void implement_one(torch::Library& library) {
  using Call = decltype(call_of(kBody));
  library.impl(
      Call::kName,
      torch::CppFunction::makeFromUnboxedFunction(
          c10::CompileTimeFunctionPointer<typename Function<Call>::Type, &Function<Call>::template run<kBody>>()));
}

inline void bump_version(const at::Tensor& tensor) {
  if (tensor.defined() && !tensor.is_inference()) {
    tensor.unsafeGetTensorImpl()->bump_version();
  }
}
inline void bump_version(at::TensorList tensors) {
  for (const auto& tensor : tensors) {
    bump_version(tensor);
  }
}
template <typename Other>
void bump_version(const Other& /*not a tensor*/) {}

}  // namespace internal

/// Calls an operator through the dispatcher.
template <typename Call>
Call::Result call(const Call& with) {
  return std::apply([](auto&... fields) { return internal::handle<Call>().call(fields...); }, with.fields());
}

/// Registers functions of operators' structs for the dispatch key of `library`.
template <auto... kBodies>
void implement(torch::Library& library) {
  (internal::implement_one<kBodies>(library), ...);
}

/// Returns another operator's struct of the same fields, with the same arguments.
template <typename To, typename From>
To as(const From& from) {
  return std::apply([](auto&... fields) { return To{fields...}; }, from.fields());
}

/// Does what the dispatch key ADInplaceOrView is for: it raises the version of each tensor that the operator changes,
/// by which autograd finds out that a saved tensor is not what it was. The schema says which tensors an operator
/// changes.
template <typename Call>
Call::Result with_version_bumps(const Call& with) {
  static const std::vector<bool> changes = [] {
    std::vector<bool> found;
    for (const auto& argument : internal::handle<Call>().schema().arguments()) {
      found.push_back(argument.alias_info() && argument.alias_info()->isWrite());
    }
    return found;
  }();
  const auto bump = [&](auto&... fields) {
    size_t i = 0;
    ((changes[i++] ? internal::bump_version(fields) : void()), ...);
  };
  const at::AutoDispatchBelowADInplaceOrView below;
  if constexpr (std::is_void_v<typename Call::Result>) {
    call(with);
    std::apply(bump, with.fields());
  } else {
    auto result = call(with);
    std::apply(bump, with.fields());
    return result;
  }
}

}  // namespace momentum_bn::ops
