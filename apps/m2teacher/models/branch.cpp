#include "models/branch.h"

#include "models/compute_dtype.h"

namespace m2teacher {

HeadImpl::HeadImpl(int64_t in_features, int64_t hidden, int64_t out_features, const NormFactory& norm) {
  fc1_ = register_module("fc1", torch::nn::Linear(torch::nn::LinearOptions(in_features, hidden).bias(false)));
  bn_ = norm(*this, "bn", {.channels = hidden, .spatial = false, .relu = true});
  fc2_ = register_module("fc2", torch::nn::Linear(hidden, out_features));
}

at::Tensor HeadImpl::forward(const at::Tensor& x) { return multiply(fc2_, bn_->forward(multiply(fc1_, x))); }

BranchImpl::BranchImpl(const BranchOptions& options, Side side, const NormFactory& norm) {
  encoder_ = register_module("encoder", Encoder(options.encoder, norm));
  projector_ = register_module("projector",
                               Head(options.encoder.features(), options.projector_hidden, options.projector_out, norm));
  if (side == Side::Student) {
    predictor_ = register_module("predictor",
                                 Head(options.projector_out, options.predictor_hidden, options.projector_out, norm));
  }
}

at::Tensor BranchImpl::forward(const at::Tensor& images) {
  const at::Tensor projection = projector_(encoder_(images));
  return predictor_ ? predictor_(projection) : projection;
}

}  // namespace m2teacher
