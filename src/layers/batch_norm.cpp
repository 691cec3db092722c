#include <momentum_bn/batch_norm.h>

namespace momentum_bn {

BatchNormLayer::BatchNormLayer(const BatchNormOptions& layer_options) : options(layer_options) {
  check(BatchNormLayer::configuration());
}

MomentumBatchNormOptions BatchNormLayer::configuration() const {
  return MomentumBatchNormOptions(options.num_features())
      .eps(options.eps())
      .momentum(options.momentum())
      .affine(options.affine())
      .bias(options.bias())
      .track_running_stats(options.track_running_stats())
      .total_iters(1)
      .views_per_update(1)
      .schedule(Schedule::Constant)
      .variance(Variance::Biased)
      .detach_statistics(false)
      .activation(options.activation())
      .inplace(options.inplace())
      .process_group(options.process_group())
      .device(options.device())
      .dtype(options.dtype());
}

void BatchNormLayer::print(std::ostream& stream, size_t dimensions) const {
  stream << std::boolalpha << "momentum_bn::BatchNorm" << dimensions << "d(" << options.num_features()
         << ", eps=" << options.eps() << ", momentum=";
  options.momentum() ? stream << *options.momentum() : stream << "None";
  stream << ", affine=" << options.affine() << ", track_running_stats=" << options.track_running_stats();
  print_extensions(stream);
  stream << ")";
}

}  // namespace momentum_bn
