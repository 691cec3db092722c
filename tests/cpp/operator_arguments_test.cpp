// Every tensor argument of every operator, with each thing wrong that a caller can get wrong: an error, and nothing was
// changed. Under AddressSanitizer (`make sanitize`) an access beyond a tensor would be noticed, too.

#include "snapshots.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_lazy_clone.h>
#include <gtest/gtest.h>
#include <momentum_bn/modules.h>

#include <functional>
#include <string>
#include <vector>

namespace momentum_bn {
namespace {

using testing::randn;
using testing::same_bits;
using Stack = std::vector<c10::IValue>;

constexpr int64_t kChannels = 3;
constexpr size_t kGroupStatistics = 14;  // the last argument of a training forward

at::Tensor images(uint64_t seed) { return randn({4, kChannels, 5, 5}, seed, at::kFloat); }
at::Tensor channels(uint64_t seed) { return randn({kChannels}, seed, at::kFloat).abs() + 0.5; }
at::Tensor count(int64_t value) { return at::full({}, value, at::kLong); }
at::Tensor saved() { return at::stack({channels(1), at::zeros({kChannels}), channels(2)}); }
at::Tensor saved_through_statistics() { return at::cat({saved(), at::full({3, kChannels}, 0.01)}); }

c10::List<at::Tensor> state() {
  return c10::List<at::Tensor>({channels(3), channels(4), count(5), channels(6), channels(7), count(1), count(2),
                                at::full({}, 0.5, at::kDouble)});
}

/// One call that is right: all of its tensors are there.
struct Call {
  std::string name;
  std::function<Stack()> arguments;
};

const std::vector<Call>& calls() {
  static const std::vector<Call> all = {
      {"_check_input", [] { return Stack{images(0), images(1), kChannels}; }},
      {"_check_parameters", [] { return Stack{images(0), channels(1), channels(2), channels(3), channels(4)}; }},
      {"_batch_statistics", [] { return Stack{images(0)}; }},
      {"_forward_train",
       [] {
         return Stack{images(0), images(1), channels(2), channels(3), state(), 1e-5,          c10::IValue(), 10,
                      2,         "cosine",  "published", true,        "relu",  c10::IValue(), c10::IValue()};
       }},
      {"_forward_train",  // the statistics of a group are there: a tensor more
       [] {
         return Stack{images(0),
                      images(1),
                      channels(2),
                      channels(3),
                      state(),
                      1e-5,
                      c10::IValue(),
                      10,
                      2,
                      "cosine",
                      "published",
                      true,
                      "relu",
                      c10::IValue(),
                      at::cat({channels(4), channels(5), at::full({1}, 100.)}).to(at::kDouble).unsqueeze(0)};
       }},
      {"_forward_train_",
       [] {
         return Stack{images(0), images(1), channels(2), channels(3), state(), 1e-5,          c10::IValue(), 10,
                      2,         "cosine",  "published", true,        "relu",  c10::IValue(), c10::IValue()};
       }},
      {"_forward_eval_",
       [] { return Stack{images(0), images(1), channels(2), channels(3), channels(4), channels(5), 1e-5, "relu"}; }},
      {"_forward_functional",
       [] { return Stack{images(0), channels(1), channels(2), channels(3), channels(4), 0.5, 1e-5, "published"}; }},
      {"_backward",
       [] {
         return Stack{images(0),   images(1), images(2), channels(3),
                      channels(4), saved(),   "relu",    c10::List<bool>({true, true, true, true})};
       }},
      {"_backward",
       [] {
         return Stack{images(0),   images(1),
                      images(2),   channels(3),
                      channels(4), saved_through_statistics(),
                      "relu",      c10::List<bool>({true, true, true, true})};
       }},
      {"_backward_",
       [] {
         return Stack{images(0),   images(1), images(2), channels(3),
                      channels(4), saved(),   "relu",    c10::List<bool>({true, true, true, true})};
       }},
      {"_gradient_sums",
       [] {
         return Stack{images(0),   images(1),
                      images(2),   channels(3),
                      channels(4), saved_through_statistics(),
                      "relu",      c10::List<bool>({false, true, true, true})};
       }},
      {"_gradient_of_input",
       [] {
         return Stack{images(0),
                      images(1),
                      images(2),
                      channels(3),
                      channels(4),
                      saved_through_statistics(),
                      at::ones({2, kChannels}, at::kDouble),
                      "relu"};
       }},
      {"_advance_schedule_", [] { return Stack{count(3), at::full({}, 0.5, at::kDouble), 10, "cosine"}; }},
      {"_teacher_update_",
       [] {
         return Stack{c10::List<at::Tensor>({images(0), channels(1).to(at::kHalf)}),
                      c10::List<at::Tensor>({at::empty({0}), channels(2)}),
                      c10::List<at::Tensor>({images(3), channels(4).to(at::kHalf)}),
                      count(5),
                      10,
                      0.9};
       }},
  };
  return all;
}

/// Where a tensor stands among the arguments: its number and, in a list, its number there.
struct Place {
  size_t argument;
  int64_t element;  // -1: no list
};

std::vector<Place> places(const Stack& stack) {
  std::vector<Place> found;
  for (size_t i = 0; i < stack.size(); ++i) {
    if (stack[i].isTensor()) {
      found.push_back({i, -1});
    } else if (stack[i].isTensorList()) {
      for (size_t k = 0; k < stack[i].toTensorList().size(); ++k) {
        found.push_back({i, static_cast<int64_t>(k)});
      }
    }
  }
  return found;
}

at::Tensor at_place(const Stack& stack, Place place) {
  return place.element < 0 ? stack[place.argument].toTensor()
                           : stack[place.argument].toTensorList().get(static_cast<size_t>(place.element));
}

void put(Stack& stack, Place place, const at::Tensor& tensor) {
  if (place.element < 0) {
    stack[place.argument] = tensor;
  } else {
    stack[place.argument].toTensorList().set(static_cast<size_t>(place.element), tensor);
  }
}

void call(const std::string& name, Stack stack) {
  const at::NoGradGuard no_grad;
  c10::Dispatcher::singleton().findSchemaOrThrow(("momentum_bn::" + name).c_str(), "").callBoxed(&stack);
}

std::vector<at::Tensor> copies(const Stack& stack) {
  std::vector<at::Tensor> all;
  for (const Place place : places(stack)) {
    const auto tensor = at_place(stack, place);
    try {
      all.push_back(tensor.clone());
    } catch (const std::exception&) {
      all.push_back({});  // torch cannot copy it
    }
  }
  return all;
}

std::string label(const Call& of, Place place) {
  const auto& schema = c10::Dispatcher::singleton().findSchemaOrThrow(("momentum_bn::" + of.name).c_str(), "").schema();
  return of.name + ", " + schema.arguments()[place.argument].name() +
         (place.element < 0 ? "" : "[" + std::to_string(place.element) + "]");
}

/// Calls with `wrong` in a place: refused, or (where `may_pass`) done; where refused, no argument was changed.
void expect_refused(const Call& of, Place place, const at::Tensor& wrong, bool may_pass, const std::string& what) {
  SCOPED_TRACE(label(of, place) + ": " + what);
  Stack stack = of.arguments();
  put(stack, place, wrong);
  const auto before = copies(stack);
  try {
    call(of.name, stack);
  } catch (const std::exception&) {
    size_t i = 0;
    for (const Place other : places(stack)) {
      const auto now = at_place(stack, other);
      if (before[i].defined() && !now.is_meta() && !now.is_sparse()) {
        EXPECT_TRUE(same_bits(now, before[i])) << label(of, other) << " was changed";
      }
      ++i;
    }
    return;
  }
  EXPECT_TRUE(may_pass) << "no error";
}

template <typename Body>
void for_every_tensor(const Body& body) {
  for (const Call& of : calls()) {
    for (const Place place : places(of.arguments())) {
      body(of, place);
    }
  }
}

/// What an operator takes beside the dtype of the sample.
bool takes(const Call& of, Place place, at::ScalarType dtype) {
  const bool sixteen_bits = dtype == at::kHalf || dtype == at::kBFloat16;
  if (of.name == "_teacher_update_") {
    return place.argument != 3;  // torch's operators average what they can
  }
  if (of.name == "_batch_statistics") {
    return sixteen_bits || dtype == at::kDouble;
  }
  if (of.name == "_check_parameters" || of.name == "_forward_functional") {
    return place.argument == 0 && sixteen_bits;  // beside parameters in float32
  }
  if (of.name == "_forward_train" && place.argument == kGroupStatistics) {
    return true;  // the statistics of a group are converted
  }
  return dtype == at::kFloat;  // momentum; all others are float32 in the sample
}

std::vector<at::ScalarType> all_dtypes() {
  std::vector<at::ScalarType> dtypes;
  for (int8_t i = 0; i < static_cast<int8_t>(at::ScalarType::NumOptions); ++i) {
    const auto dtype = static_cast<at::ScalarType>(i);
    if (dtype != at::ScalarType::Undefined && !at::isQIntType(dtype)) {
      dtypes.push_back(dtype);
    }
  }
  return dtypes;
}

TEST(OperatorArguments, TheSamplesAreRight) {
  for (const Call& of : calls()) {
    SCOPED_TRACE(of.name);
    EXPECT_NO_THROW(call(of.name, of.arguments()));
  }
}

TEST(OperatorArguments, OtherDtypes) {
  for_every_tensor([&](const Call& of, Place place) {
    const auto right = at_place(of.arguments(), place);
    for (const auto dtype : all_dtypes()) {
      if (dtype == right.scalar_type()) {
        continue;
      }
      at::Tensor wrong;
      try {
        wrong = at::zeros(right.sizes(), dtype);
      } catch (const std::exception&) {
        wrong = at::empty(right.sizes(), dtype);  // torch cannot fill it
      }
      expect_refused(of, place, wrong, takes(of, place, dtype), c10::toString(dtype));
    }
  });
}

TEST(OperatorArguments, OtherShapes) {
  for_every_tensor([&](const Call& of, Place place) {
    const auto right = at_place(of.arguments(), place);
    const auto options = right.options();
    // Where no residual stands beside it, an input of any size will do; and an absent master is an empty tensor.
    const bool any_images = place.argument == 0 && (of.name == "_batch_statistics" || of.name == "_check_parameters" ||
                                                    of.name == "_forward_functional");
    const bool master = of.name == "_teacher_update_" && place.argument == 1;
    const bool gathered = of.name == "_forward_train" && place.argument == kGroupStatistics;
    expect_refused(of, place, at::zeros({0}, options), master, "no element");
    expect_refused(of, place, at::zeros({2}, options), false, "two values");
    if (right.dim() > 0) {
      expect_refused(of, place, at::zeros({}, options), false, "no dimension");
      auto longer = right.sizes().vec();
      longer.push_back(2);
      expect_refused(of, place, at::zeros(longer, options), any_images || (master && right.numel() == 0),
                     "a dimension more");
      for (int64_t d = 0; d < right.dim(); ++d) {
        for (const int64_t by : {-1, 1}) {
          auto sizes = right.sizes().vec();
          sizes[static_cast<size_t>(d)] += by;
          if (sizes[static_cast<size_t>(d)] < 0) {
            continue;
          }
          // Of a group any number of ranks has statistics.
          const bool may_pass =
              (any_images && (d != 1 || of.name == "_batch_statistics")) || (gathered && d == 0 && by == 1);
          expect_refused(of, place, at::zeros(sizes, options), may_pass,
                         "dimension " + std::to_string(d) + " off by " + std::to_string(by));
        }
      }
    }
  });
}

TEST(OperatorArguments, OtherDevicesAndLayouts) {
  for_every_tensor([&](const Call& of, Place place) {
    const auto right = at_place(of.arguments(), place);
    const bool alone = places(of.arguments()).size() == 1;
    const bool no_master = of.name == "_teacher_update_" && right.numel() == 0;
    expect_refused(of, place, right.to(at::kMeta), alone || no_master, "meta");
    if (right.dim() > 0) {
      expect_refused(of, place, right.to_sparse(), no_master, "sparse");
    }
  });
}

TEST(OperatorArguments, StridesChangeNothing) {
  for_every_tensor([&](const Call& of, Place place) {
    SCOPED_TRACE(label(of, place));
    Stack dense = of.arguments();
    Stack strided = of.arguments();
    const auto right = at_place(strided, place);
    if (right.dim() == 0) {
      return;
    }
    // Every other element of memory that is twice as long.
    auto sizes = right.sizes().vec();
    sizes.back() *= 2;
    auto wide = at::full(sizes, 100, right.options());
    const auto view = wide.slice(-1, 0, sizes.back(), 2);
    view.copy_(right);
    put(strided, place, view);
    call(of.name, dense);
    call(of.name, strided);
    const auto with_dense = copies(dense);
    const auto with_strided = copies(strided);
    for (size_t i = 0; i < with_dense.size(); ++i) {
      // torch's own evaluation takes other loops for other strides.
      const bool close = of.name == "_forward_eval_" && at::allclose(with_strided[i], with_dense[i], 1e-6, 1e-6);
      EXPECT_TRUE(close || same_bits(with_strided[i], with_dense[i])) << "tensor " << i;
    }
    EXPECT_EQ(wide.slice(-1, 1, sizes.back(), 2).ne(100).sum().item<int64_t>(), 0) << "written between the elements";
  });
}

TEST(OperatorArguments, CopyOnWriteClonesKeepTheirValues) {
  for_every_tensor([&](const Call& of, Place place) {
    SCOPED_TRACE(label(of, place));
    Stack stack = of.arguments();
    const auto tensor = at_place(stack, place);
    const auto before = tensor.clone();
    const auto clone = at::_lazy_clone(tensor);
    call(of.name, stack);
    EXPECT_TRUE(same_bits(clone, before)) << "the clone changed with the argument";
    Stack other = of.arguments();
    const auto original = at_place(other, place);
    put(other, place, at::_lazy_clone(original));
    call(of.name, other);
    EXPECT_TRUE(same_bits(original, before)) << "the original changed with its clone";
  });
}

}  // namespace
}  // namespace momentum_bn
