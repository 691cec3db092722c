#include "eval/linear.h"

#include "data/batch_sampler.h"
#include "device/upload.h"
#include "error.h"
#include "training/learning_rate.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/randperm.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>
#include <torch/optim/lbfgs.h>

#include <algorithm>

namespace m2teacher {
namespace {

constexpr double kSmallestStd = 1e-6;

/// Brings features to mean 0 and standard deviation 1 of the set that it was made of.
class Standardiser {
 public:
  explicit Standardiser(const at::Tensor& features)
      : mean_(features.mean(0)), scale_(features.std(0, /*unbiased=*/false).clamp_min_(kSmallestStd).reciprocal_()) {}

  at::Tensor operator()(const at::Tensor& features) const { return features.sub(mean_).mul_(scale_); }

 private:
  at::Tensor mean_;
  at::Tensor scale_;
};

struct Probe {
  at::Tensor weight;  // (classes, F)
  at::Tensor bias;    // (classes)

  /// @param features  (N, F): of the F and on the device that these have
  Probe(int64_t classes, const at::Tensor& features)
      : weight(at::zeros({classes, features.size(1)}, features.options())),
        bias(at::zeros({classes}, features.options())) {}

  at::Tensor logits(const at::Tensor& features) const { return at::linear(features, weight, bias); }

  double accuracy(const at::Tensor& features, const at::Tensor& labels) const {
    return 100 * logits(features).argmax(1).eq(labels.to(features.device())).to(at::kDouble).mean().item<double>();
  }
};

}  // namespace

double linear_accuracy(const LabelledFeatures& train, const LabelledFeatures& test, int64_t classes,
                       const LinearProbeOptions& options) {
  torch::NoGradGuard no_grad;
  const Standardiser standardise(train.features);
  const at::Tensor features = standardise(train.features);
  const int64_t batch_size = std::min(options.batch_size, features.size(0));
  BatchSampler sampler(features.size(0), batch_size, options.seed);
  Probe probe(classes, features);
  Probe velocity(classes, features);
  for (int64_t step = 0; step < options.steps; ++step) {
    const at::Tensor index = sampler.batch(step);
    const at::Tensor x = features.index_select(0, on_device(index, features.device()));
    const at::Tensor labels = on_device(train.labels.index_select(0, index).unsqueeze(1), features.device());
    // Gradient of the mean cross entropy by the logits: (softmax - one hot) / batch.
    at::Tensor gradient = probe.logits(x).softmax(1);
    gradient.scatter_add_(1, labels, at::full({batch_size, 1}, -1.0, gradient.options())).div_(batch_size);
    velocity.weight.mul_(options.sgd_momentum).addmm_(gradient.t(), x);
    velocity.bias.mul_(options.sgd_momentum).add_(gradient.sum(0));
    const double rate = learning_rate(step, options.steps, /*warmup_steps=*/0, options.learning_rate);
    probe.weight.sub_(velocity.weight, rate);
    probe.bias.sub_(velocity.bias, rate);
  }
  return probe.accuracy(standardise(test.features), test.labels);
}

std::string too_few_labels(const at::Tensor& labels, const std::vector<std::string>& class_names,
                           int64_t labels_per_class) {
  for (size_t label = 0; label < class_names.size(); ++label) {
    const auto members = labels.eq(static_cast<int64_t>(label)).sum().item<int64_t>();
    if (members > 0 && members < labels_per_class) {
      return "class " + class_names[label] + " has " + std::to_string(members) + " training images, " +
             std::to_string(labels_per_class) + " were asked for";
    }
  }
  return "";
}

at::Tensor draw_per_class(const at::Tensor& labels, int64_t classes, int64_t count, uint64_t seed) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  std::vector<at::Tensor> drawn;
  for (int64_t label = 0; label < classes; ++label) {
    const at::Tensor members = labels.eq(label).nonzero().flatten();
    if (members.size(0) == 0) {
      continue;
    }
    if (members.size(0) < count) {
      throw UserError("--labels-per-class: class " + std::to_string(label) + " has " + std::to_string(members.size(0)) +
                      " training images, " + std::to_string(count) + " were asked for");
    }
    const at::Tensor order = at::randperm(members.size(0), generator, at::kLong);
    drawn.push_back(members.index_select(0, order.narrow(0, 0, count)));
  }
  return at::cat(drawn);
}

double few_labels_accuracy(const LabelledFeatures& train, const LabelledFeatures& test, int64_t classes,
                           const FewLabelsOptions& options) {
  const Standardiser standardise(train.features);
  const at::Tensor test_features = standardise(test.features);
  double sum = 0;
  for (int64_t draw = 0; draw < options.draws; ++draw) {
    const at::Tensor index =
        draw_per_class(train.labels, classes, options.labels_per_class, options.seed + static_cast<uint64_t>(draw));
    const at::Device device = train.features.device();
    const at::Tensor features = standardise(train.features.index_select(0, index.to(device)));
    const at::Tensor labels = train.labels.index_select(0, index).to(device);
    Probe probe(classes, features);
    probe.weight.requires_grad_();
    probe.bias.requires_grad_();
    torch::optim::LBFGS optimiser(
        std::vector<at::Tensor>{probe.weight, probe.bias},
        torch::optim::LBFGSOptions(1).max_iter(options.max_iterations).line_search_fn("strong_wolfe"));
    optimiser.step([&] {
      optimiser.zero_grad();
      at::Tensor loss = at::cross_entropy_loss(probe.logits(features), labels) +
                        probe.weight.square().sum() * (options.weight_penalty / 2);
      loss.backward();
      return loss;
    });
    torch::NoGradGuard no_grad;
    sum += probe.accuracy(test_features, test.labels);
  }
  return sum / static_cast<double>(options.draws);
}

double probe_accuracy(const LabelledFeatures& train, const LabelledFeatures& test, int64_t classes,
                      int64_t labels_per_class, uint64_t seed) {
  if (labels_per_class == 0) {
    return linear_accuracy(train, test, classes, {.seed = seed});
  }
  return few_labels_accuracy(train, test, classes, {.labels_per_class = labels_per_class, .seed = seed});
}

}  // namespace m2teacher
