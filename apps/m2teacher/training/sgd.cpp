#include "training/sgd.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_fused_sgd.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

namespace m2teacher {
namespace {

/// The gradient with its decay, scaled to the parameter's norm times the coefficient; as it is where either norm is 0.
/// No number is read: that would wait for the device.
at::Tensor trusted(const at::Tensor& gradient, const at::Tensor& parameter, double weight_decay, double coefficient) {
  at::Tensor decayed = gradient.add(parameter, weight_decay);
  const at::Tensor parameter_norm = at::linalg_vector_norm(parameter).to(at::kDouble);
  const at::Tensor gradient_norm = at::linalg_vector_norm(decayed).to(at::kDouble);
  const at::Tensor both = parameter_norm.gt(0).logical_and_(gradient_norm.gt(0));
  return decayed.mul_(at::where(both, coefficient * parameter_norm / gradient_norm, 1));
}

/// The same step in plain operations, for devices without torch's fused kernel.
void plain_sgd_(const std::vector<at::Tensor>& parameters, const std::vector<at::Tensor>& gradients,
                const std::vector<at::Tensor>& velocities, double weight_decay, double momentum, double learning_rate) {
  for (size_t i = 0; i < parameters.size(); ++i) {
    velocities[i].mul_(momentum).add_(gradients[i].add(parameters[i], weight_decay));
    parameters[i].sub_(velocities[i], learning_rate);
  }
}

bool has_fused_kernel(at::Device device) { return device.is_cpu() || device.is_cuda(); }

}  // namespace

Sgd::Sgd(const torch::nn::Module& module, double momentum, double weight_decay, std::optional<double> trust_coefficient)
    : momentum_(momentum) {
  decayed_.weight_decay = weight_decay;
  decayed_.trust_coefficient = trust_coefficient;
  for (const auto& item : module.named_parameters()) {
    const at::Tensor& parameter = item.value();
    Group& group = parameter.dim() > 1 ? decayed_ : undecayed_;
    group.names.push_back(item.key());
    group.parameters.push_back(parameter);
    group.velocities.push_back(at::zeros_like(parameter));
  }
}

std::pair<size_t, size_t> Sgd::entries(const Group& group, int64_t part, int64_t parts) {
  int64_t total = 0;
  for (const at::Tensor& parameter : group.parameters) {
    total += parameter.numel();
  }
  // An entry belongs to the part in which its middle lies.
  const auto begin_of = [&](int64_t wanted) {
    int64_t before = 0;
    size_t entry = 0;
    while (entry < group.parameters.size() &&
           (2 * before + group.parameters[entry].numel()) * parts < 2 * total * wanted) {
      before += group.parameters[entry++].numel();
    }
    return entry;
  };
  return {begin_of(part), part + 1 == parts ? group.parameters.size() : begin_of(part + 1)};
}

void Sgd::step(double learning_rate, int64_t part, int64_t parts) {
  for (Group* group : {&decayed_, &undecayed_}) {
    std::vector<at::Tensor> parameters;
    std::vector<at::Tensor> gradients;
    std::vector<at::Tensor> velocities;
    const auto [begin, end] = entries(*group, part, parts);
    for (size_t i = begin; i < end; ++i) {
      at::Tensor& parameter = group->parameters[i];
      parameters.push_back(parameter.detach());
      // The kernel walks raw memory, so both need the same strides.
      const at::Tensor gradient = parameter.grad().contiguous(parameter.suggest_memory_format());
      gradients.push_back(group->trust_coefficient
                              ? trusted(gradient, parameters.back(), group->weight_decay, *group->trust_coefficient)
                              : gradient);
      velocities.push_back(group->velocities[i]);
      parameter.mutable_grad().reset();
    }
    if (parameters.empty()) {
      continue;
    }
    // LARS has added the decay before it scaled the gradients.
    const double weight_decay = group->trust_coefficient ? 0 : group->weight_decay;
    if (has_fused_kernel(parameters.front().device())) {
      at::_fused_sgd_(parameters, gradients, velocities, weight_decay, momentum_, learning_rate, /*dampening=*/0,
                      /*nesterov=*/false, /*maximize=*/false, /*is_first_step=*/false);
    } else {
      plain_sgd_(parameters, gradients, velocities, weight_decay, momentum_, learning_rate);
    }
  }
}

std::map<std::string, at::Tensor> Sgd::velocities() const {
  std::map<std::string, at::Tensor> velocities;
  for (const Group* group : {&decayed_, &undecayed_}) {
    for (size_t i = 0; i < group->names.size(); ++i) {
      velocities.emplace(group->names[i], group->velocities[i]);
    }
  }
  return velocities;
}

}  // namespace m2teacher
