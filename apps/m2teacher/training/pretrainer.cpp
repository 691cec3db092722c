#include "training/pretrainer.h"

#include "data/standardise.h"
#include "training/learning_rate.h"
#include "training/loss.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/cat.h>
#include <torch/utils.h>

namespace m2teacher {
namespace {

/// Seeds the initial weights, too: called before the first network is built.
uint64_t seeded(uint64_t seed) {
  torch::manual_seed(seed);
  return seed;
}

double bn_momentum(const torch::nn::Module& teacher) {
  for (const auto& module : teacher.modules()) {
    if (const auto* layer = dynamic_cast<const momentum_bn::MomentumBatchNormLayer*>(module.get())) {
      return layer->momentum().value_or(0);
    }
  }
  return 0;
}

}  // namespace

Pretrainer::Pretrainer(const PretrainOptions& options, at::Tensor images, const NormFactory& teacher_norm)
    : options_(options),
      images_(std::move(images)),
      sampler_(images_.size(0), options.batch_size, seeded(options.seed)),
      augment_generator_(at::make_generator<at::CPUGeneratorImpl>(options.seed)),
      student_(options.model, BranchImpl::Side::Student, batch_norm()),
      teacher_(student_, Branch(options.model, BranchImpl::Side::Teacher, teacher_norm), options.steps,
               options.param_momentum),
      optimiser_(*student_, options.sgd_momentum, options.weight_decay) {}

at::Tensor Pretrainer::next_views() {
  const at::Tensor batch = to_unit_range(images_.index_select(0, sampler_.next()));
  const AugmentDraw draw = draw_augmentations(2 * options_.batch_size, options_.augment, augment_generator_);
  return standardise_(apply_augmentations(at::cat({batch, batch}), draw));
}

StepReport Pretrainer::step() {
  StepReport report;
  report.step = steps_done_ + 1;
  report.learning_rate = learning_rate(steps_done_, options_.steps, options_.warmup_steps, options_.learning_rate);
  report.param_momentum = teacher_->param_momentum();
  report.bn_momentum = bn_momentum(*teacher_.ptr());

  const std::vector<at::Tensor> views = next_views().chunk(2);
  teacher_.update();
  const at::Tensor target1 = teacher_.forward(views[0]);
  const at::Tensor target2 = teacher_.forward(views[1]);
  const at::Tensor loss = cosine_loss(student_(views[0]), target2) + cosine_loss(student_(views[1]), target1);
  loss.backward();
  optimiser_.step(report.learning_rate);

  ++steps_done_;
  report.loss = loss.item<double>();
  return report;
}

}  // namespace m2teacher
