#include "ops/normalise/options.h"

#include <c10/util/Exception.h>

#include <cmath>

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

Schedule schedule_of(ops::Word word) {
  if (word == "cosine") {
    return Schedule::Cosine;
  }
  TORCH_CHECK_VALUE(word == "constant", "schedule must be 'cosine' or 'constant' (got '", word, "')");
  return Schedule::Constant;
}

Variance variance_of(ops::Word word) {
  if (word == "published") {
    return Variance::Published;
  }
  if (word == "unbiased") {
    return Variance::Unbiased;
  }
  TORCH_CHECK_VALUE(word == "biased", "variance must be 'published', 'unbiased' or 'biased' (got '", word, "')");
  return Variance::Biased;
}

bool is_relu(const ops::MaybeWord& activation) {
  TORCH_CHECK_VALUE(!activation || *activation == "relu", "activation must be None or 'relu' (got '", *activation,
                    "')");
  return activation.has_value();
}

void check_num_features(int64_t num_features) {
  TORCH_CHECK_VALUE(num_features >= 0, "num_features must be at least 0 (got ", num_features, ")");
}

void check_eps(double eps) {
  TORCH_CHECK_VALUE(eps > 0 && std::isfinite(eps), "eps must be positive and finite (got ", eps, ")");
}

void check_momentum(std::optional<double> momentum) {
  TORCH_CHECK_VALUE(!momentum || (*momentum >= 0 && *momentum <= 1), "momentum must be None or in [0, 1] (got ",
                    *momentum, ")");
}

void check_total_iters(int64_t total_iters) {
  TORCH_CHECK_VALUE(total_iters >= 1, "total_iters must be at least 1 (got ", total_iters, ")");
}

void check_cur_iter(int64_t cur_iter) {
  TORCH_CHECK_VALUE(cur_iter >= 0, "cur_iter must be at least 0 (got ", cur_iter, ")");
}

void check_options(const ops::Options& options) {
  check_eps(options.eps);
  check_momentum(options.momentum);
  check_total_iters(options.total_iters);
  TORCH_CHECK_VALUE(options.views_per_update >= 1, "views_per_update must be at least 1 (got ",
                    options.views_per_update, ")");
  schedule_of(options.schedule);
  variance_of(options.variance);
  is_relu(options.activation);
}

kernels::BlendOptions blend_options_of(const ops::Options& options) {
  return {.eps = options.eps,
          .total_iters = options.total_iters,
          .views_per_update = options.views_per_update,
          .cosine = schedule_of(options.schedule) == Schedule::Cosine,
          .variance = variance_of(options.variance)};
}

}  // namespace momentum_bn
