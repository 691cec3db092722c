#pragma once

#include "models/encoder.h"

#include <torch/nn/modules/linear.h>

namespace m2teacher {

/// Linear, normalisation, ReLU, linear: the paper's projector and predictor.
class HeadImpl : public torch::nn::Module {
 public:
  HeadImpl(int64_t in_features, int64_t hidden, int64_t out_features, const NormFactory& norm);
  /// (N, in_features) to (N, out_features)
  at::Tensor forward(const at::Tensor& x);

 private:
  torch::nn::Linear fc1_{nullptr};
  std::unique_ptr<Norm> bn_;
  torch::nn::Linear fc2_{nullptr};
};
TORCH_MODULE(Head);

struct BranchOptions {
  EncoderOptions encoder;
  // The paper's (arXiv 2101.07525, section 4.1).
  int64_t projector_hidden = 4096;
  int64_t predictor_hidden = 4096;
  int64_t projector_out = 256;  ///< of the predictor, too
};

/// One side of the pair: encoder and projector, and for the student a predictor.
/// Parameters of both sides that belong together have the same name.
class BranchImpl : public torch::nn::Module {
 public:
  enum class Side { Student, Teacher };

  BranchImpl(const BranchOptions& options, Side side, const NormFactory& norm);

  /// (N, C, H, W), standardised, to (N, projector_out)
  at::Tensor forward(const at::Tensor& images);
  Encoder& encoder() { return encoder_; }

 private:
  Encoder encoder_{nullptr};
  Head projector_{nullptr};
  Head predictor_{nullptr};
};
TORCH_MODULE(Branch);

}  // namespace m2teacher
