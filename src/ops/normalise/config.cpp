#include "ops/normalise/config.h"

#include <c10/util/Exception.h>

namespace momentum_bn {

const char* to_word(Schedule schedule) { return schedule == Schedule::Cosine ? "cosine" : "constant"; }

const char* to_word(Variance variance) {
  switch (variance) {
    case Variance::Published:
      return "published";
    case Variance::Unbiased:
      return "unbiased";
    case Variance::Biased:
      return "biased";
  }
  return "";
}

std::optional<std::string> to_word(Activation activation) {
  return activation == Activation::ReLU ? std::optional<std::string>("relu") : std::nullopt;
}

Schedule schedule_of(std::string_view word) {
  if (word == "cosine") {
    return Schedule::Cosine;
  }
  if (word == "constant") {
    return Schedule::Constant;
  }
  TORCH_CHECK_VALUE(false, "schedule must be 'cosine' or 'constant' (got '", word, "')");
}

Variance variance_of(std::string_view word) {
  if (word == "published") {
    return Variance::Published;
  }
  if (word == "unbiased") {
    return Variance::Unbiased;
  }
  if (word == "biased") {
    return Variance::Biased;
  }
  TORCH_CHECK_VALUE(false, "variance must be 'published', 'unbiased' or 'biased' (got '", word, "')");
}

Activation activation_of(std::optional<std::string_view> word) {
  if (!word) {
    return Activation::None;
  }
  if (*word == "relu") {
    return Activation::ReLU;
  }
  TORCH_CHECK_VALUE(false, "activation must be None or 'relu' (got '", *word, "')");
}

}  // namespace momentum_bn
