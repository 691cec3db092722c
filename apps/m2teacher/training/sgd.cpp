#include "training/sgd.h"

#include <ATen/ops/_fused_sgd.h>
#include <ATen/ops/zeros_like.h>

namespace m2teacher {

Sgd::Sgd(const torch::nn::Module& module, double momentum, double weight_decay) : momentum_(momentum) {
  decayed_.weight_decay = weight_decay;
  for (const auto& item : module.named_parameters()) {
    const at::Tensor& parameter = item.value();
    Group& group = parameter.dim() > 1 ? decayed_ : undecayed_;
    group.names.push_back(item.key());
    group.parameters.push_back(parameter);
    group.velocities.push_back(at::zeros_like(parameter));
  }
}

void Sgd::step(double learning_rate) {
  for (Group* group : {&decayed_, &undecayed_}) {
    std::vector<at::Tensor> parameters;
    std::vector<at::Tensor> gradients;
    parameters.reserve(group->parameters.size());
    gradients.reserve(group->parameters.size());
    for (at::Tensor& parameter : group->parameters) {
      parameters.push_back(parameter.detach());
      // The kernel walks raw memory, so both need the same strides.
      gradients.push_back(parameter.grad().contiguous(parameter.suggest_memory_format()));
      parameter.mutable_grad().reset();
    }
    at::_fused_sgd_(parameters, gradients, group->velocities, group->weight_decay, momentum_, learning_rate,
                    /*dampening=*/0, /*nesterov=*/false, /*maximize=*/false,
                    /*is_first_step=*/false);
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
