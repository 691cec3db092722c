#pragma once

#include <c10/core/Device.h>
#include <torch/nn/module.h>

namespace m2teacher {

/// Moves parameters and buffers to any device, meta and devices of extensions too, which torch's own `to` refuses in
/// C++.
void move_module(torch::nn::Module& module, at::Device device);

}  // namespace m2teacher
