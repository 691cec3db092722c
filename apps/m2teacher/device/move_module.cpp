#include "device/move_module.h"

#include <torch/utils.h>

#include <vector>

namespace m2teacher {
namespace {

/// Gives a tensor the memory of its copy on the device: layers hold tensors, so it must stay the same one.
void move_in_place(const at::Tensor& tensor, at::Device device) {
  const at::Tensor moved = tensor.detach().to(device);
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(moved.storage());
  impl->_change_backend_component_keys(device);
}

}  // namespace

void move_module(torch::nn::Module& module, at::Device device) {
  if (device.is_cpu() || device.is_cuda()) {
    module.to(device);
    return;
  }
  const torch::NoGradGuard no_grad;
  for (const std::vector<at::Tensor>& tensors : {module.parameters(), module.buffers()}) {
    for (const at::Tensor& tensor : tensors) {
      move_in_place(tensor, device);
    }
  }
}

}  // namespace m2teacher
