#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <momentum_bn/modules.h>

#include <cstring>
#include <map>
#include <optional>
#include <string>

/// Complete copies of a layer's state, to be compared bit for bit.
namespace momentum_bn::testing {

/// Equal dtype, shape and bytes: NaN equals NaN, and 0 does not equal -0.
inline bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.defined() != b.defined()) {
    return false;
  }
  if (!a.defined()) {
    return true;
  }
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) {
    return false;
  }
  const at::Tensor left = a.detach().contiguous();
  const at::Tensor right = b.detach().contiguous();
  return left.numel() == 0 || std::memcmp(left.data_ptr(), right.data_ptr(), left.nbytes()) == 0;
}

struct Snapshot {
  std::map<std::string, at::Tensor> tensors;
  std::optional<double> momentum;
  int64_t cur_iter = 0;
  int64_t total_iters = 0;
};

template <typename Layer>
Snapshot snapshot(Layer layer) {
  Snapshot taken;
  for (const auto& item : layer->named_parameters()) {
    taken.tensors[item.key()] = item.value().detach().clone();
  }
  for (const auto& item : layer->named_buffers()) {
    taken.tensors[item.key()] = item.value().clone();
  }
  taken.momentum = layer->momentum();
  taken.cur_iter = layer->cur_iter();
  taken.total_iters = layer->total_iters();
  return taken;
}

inline void expect_same(const Snapshot& now, const Snapshot& before) {
  ASSERT_EQ(now.tensors.size(), before.tensors.size());
  for (const auto& [name, value] : before.tensors) {
    ASSERT_TRUE(now.tensors.count(name)) << name;
    EXPECT_TRUE(same_bits(now.tensors.at(name), value)) << name << ": " << now.tensors.at(name) << " != " << value;
  }
  EXPECT_EQ(now.momentum, before.momentum);
  EXPECT_EQ(now.cur_iter, before.cur_iter);
  EXPECT_EQ(now.total_iters, before.total_iters);
}

inline void expect_close(const at::Tensor& actual, const at::Tensor& expected, double tolerance,
                         const std::string& what = "") {
  ASSERT_EQ(actual.sizes(), expected.sizes()) << what;
  const at::Tensor a = actual.detach().to(at::kDouble);
  const at::Tensor b = expected.detach().to(at::kDouble);
  EXPECT_TRUE(at::allclose(a, b, tolerance, tolerance)) << what << ": off by " << (a - b).abs().max().item<double>();
}

/// Standard normal values that depend on the seed alone.
inline at::Tensor randn(at::IntArrayRef shape, uint64_t seed, at::ScalarType dtype = at::kDouble) {
  at::manual_seed(seed);
  return at::randn(shape, at::kDouble).to(dtype);
}

/// Weights around 1 and biases around 0, the same for every layer of the same size.
template <typename Layer>
Layer randomise_parameters(Layer layer) {
  at::NoGradGuard no_grad;
  if (layer->weight.defined()) {
    layer->weight.copy_(randn(layer->weight.sizes(), 77) * 0.2 + 1);
  }
  if (layer->bias.defined()) {
    layer->bias.copy_(randn(layer->bias.sizes(), 78) * 0.2);
  }
  return layer;
}

}  // namespace momentum_bn::testing
