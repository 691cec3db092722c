#include <momentum_bn/norm_layer.h>

#include "ops/normalise/calls.h"
#include "ops/normalise/composite.h"
#include "ops/normalise/inputs.h"
#include "ops/normalise/options.h"
#include "ops/shared/group.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/serialize/input-archive.h>

#include <algorithm>

namespace momentum_bn {
namespace {

void check_rank(const at::Tensor& x, size_t dimensions) {
  if (dimensions == 1) {
    TORCH_CHECK_VALUE(x.dim() == 2 || x.dim() == 3, "expected 2D or 3D input (got ", x.dim(), "D input)");
  } else {
    const auto rank = static_cast<int64_t>(dimensions) + 2;
    TORCH_CHECK_VALUE(x.dim() == rank, "expected ", rank, "D input (got ", x.dim(), "D input)");
  }
}

bool takes_gradient(const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }

/// The options of a layer that the operators are given.
ops::Options operator_options(const MomentumBatchNormOptions& config) {
  return {.eps = config.eps(),
          .momentum = config.momentum(),
          .total_iters = config.total_iters(),
          .views_per_update = config.views_per_update(),
          .schedule = to_word(config.schedule()),
          .variance = to_word(config.variance()),
          .detach_statistics = config.detach_statistics(),
          .activation = config.activation() == Activation::ReLU ? ops::MaybeWord("relu") : std::nullopt};
}

}  // namespace

void NormLayer::check(const MomentumBatchNormOptions& config) {
  check_num_features(config.num_features());
  check_options(operator_options(config));
  if (config.process_group()) {
    check_process_group(*config.process_group());
  }
}

void NormLayer::register_state(torch::nn::Module& module) {
  const auto config = configuration();
  const auto values = at::TensorOptions().device(config.device()).dtype(config.dtype());
  const int64_t channels = config.num_features();
  const bool with_bias = config.affine() && config.bias();
  weight = module.register_parameter("weight", config.affine() ? at::empty({channels}, values) : at::Tensor(),
                                     config.affine());
  bias = module.register_parameter("bias", with_bias ? at::empty({channels}, values) : at::Tensor(), with_bias);
  if (config.track_running_stats()) {
    running_mean = module.register_buffer("running_mean", at::zeros({channels}, values));
    running_var = module.register_buffer("running_var", at::ones({channels}, values));
    num_batches_tracked = module.register_buffer("num_batches_tracked", at::zeros({}, values.dtype(at::kLong)));
    register_own_state(module);
  }
  reset_parameters();
}

void NormLayer::reset_running_stats() {
  if (!running_mean.defined()) {
    return;
  }
  torch::NoGradGuard no_grad;
  running_mean.zero_();
  running_var.fill_(1);
  num_batches_tracked.zero_();
}

void NormLayer::reset_parameters() {
  reset_running_stats();
  torch::NoGradGuard no_grad;
  if (weight.defined()) {
    weight.fill_(1);
  }
  if (bias.defined()) {
    bias.zero_();
  }
}

std::vector<at::Tensor> NormLayer::state() const { return {running_mean, running_var, num_batches_tracked}; }

at::Tensor NormLayer::forward_checked(const at::Tensor& x, const at::Tensor& residual, size_t dimensions,
                                      bool training) {
  const auto config = configuration();
  check_rank(x, dimensions);
  check_input(x, residual);
  check_channels(x, config.num_features());
  const auto options = operator_options(config);
  const ops::MaybeTensor added = residual;
  const ops::MaybeTensor weight_or_none = weight;
  const ops::MaybeTensor bias_or_none = bias;
  const bool by_running_statistics = !training && config.track_running_stats();
  const bool through_statistics = !by_running_statistics && !config.detach_statistics();
  const bool x_needed_again =
      at::GradMode::is_enabled() &&
      (takes_gradient(weight) ||
       (through_statistics && (takes_gradient(x) || takes_gradient(residual) || takes_gradient(bias))));
  const bool overwrite = config.inplace() && !x_needed_again;

  if (by_running_statistics) {
    if (overwrite) {
      at::Tensor y = x;
      ops::call(ops::ForwardEvalInplace{y, added, weight_or_none, bias_or_none, running_mean, running_var, options.eps,
                                        options.activation});
      return y;
    }
    return composite::evaluate(x, added, weight_or_none, bias_or_none, running_mean, running_var, options.eps,
                               options.activation.has_value());
  }
  const auto buffers = config.track_running_stats() ? state() : std::vector<at::Tensor>();
  // In evaluation a batch that normalises itself does so by itself.
  const bool in_group = training && config.process_group();
  const auto group = in_group ? ops::MaybeWord(*config.process_group()) : std::nullopt;
  const ops::MaybeTensor not_gathered;
  const auto arguments = [&]<typename X>(X of_x) {
    return ops::TrainArguments<X>{of_x, added, weight_or_none, bias_or_none, buffers, options, group, not_gathered};
  };
  if (overwrite) {
    at::Tensor y = x;
    ops::call(ops::ForwardTrainInplace{arguments.operator()<at::Tensor&>(y)});
    return y;
  }
  return std::get<0>(ops::call(ops::ForwardTrain{arguments.operator()<const at::Tensor&>(x)}));
}

void NormLayer::load_state(torch::nn::Module& module, torch::serialize::InputArchive& archive) {
  const auto own = own_buffers();
  const auto has = [&archive](const std::string& name) {
    at::Tensor value;  // a new one for each: what was read shares memory with the archive
    return archive.try_read(name, value, /*is_buffer=*/true);
  };
  const bool plain = std::none_of(own.begin(), own.end(), has);

  // Everything is read before anything is changed.
  std::vector<std::pair<at::Tensor, at::Tensor>> loaded;
  for (auto& parameter : module.named_parameters(/*recurse=*/false)) {
    at::Tensor value;
    archive.read(parameter.key(), value);
    loaded.emplace_back(parameter.value(), value);
  }
  for (auto& buffer : module.named_buffers(/*recurse=*/false)) {
    if (plain && std::find(own.begin(), own.end(), buffer.key()) != own.end()) {
      continue;
    }
    at::Tensor value;
    archive.read(buffer.key(), value, /*is_buffer=*/true);
    loaded.emplace_back(buffer.value(), value);
  }
  torch::NoGradGuard no_grad;
  for (auto& [tensor, value] : loaded) {
    tensor.set_data(value.to(tensor.device()));
  }
  if (configuration().track_running_stats()) {
    after_load(plain);
  }
}

std::vector<NormLayer::KeptBuffer> NormLayer::kept_buffers() {
  if (!num_batches_tracked.defined()) {
    return {};
  }
  return {{&num_batches_tracked, at::kLong}};
}

void NormLayer::keep_precision_while(std::optional<c10::Device> target, const std::function<void()>& cast) {
  torch::NoGradGuard no_grad;
  std::vector<at::Tensor> values;
  for (const auto& kept : kept_buffers()) {
    values.push_back(kept.buffer->detach().clone());
    // A device without float64 refuses to take one.
    if (target && target->is_mps() && kept.dtype == at::kDouble) {
      kept.buffer->set_data(kept.buffer->to(at::kFloat));
    }
  }
  cast();
  // Their dtypes follow the device and the statistics.
  const auto now = kept_buffers();
  for (size_t i = 0; i < now.size(); ++i) {
    now[i].buffer->set_data(values[i].to(at::TensorOptions().device(running_mean.device()).dtype(now[i].dtype)));
  }
}

void NormLayer::print_extensions(std::ostream& stream) const {
  const auto config = configuration();
  if (const auto word = to_word(config.activation())) {
    stream << ", activation=" << *word;
  }
  if (config.inplace()) {
    stream << ", inplace=true";
  }
  if (config.process_group()) {
    stream << ", process_group=" << *config.process_group();
  }
}

}  // namespace momentum_bn
