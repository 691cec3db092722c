#include "training/pretrainer.h"

#include "data/augment.h"
#include "device/move_module.h"
#include "dtype_and_shape.h"
#include "error.h"
#include "models/compute_dtype.h"
#include "models/view_order.h"
#include "training/learning_rate.h"
#include "training/loss.h"

#include <ATen/ops/full.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>
#include <momentum_bn/schedule.h>
#include <torch/utils.h>

#include <algorithm>

namespace m2teacher {
namespace {

constexpr const char* kStepEntry = "step";
constexpr const char* kUpdatesEntry = "teacher_updates";
constexpr int64_t kViews = 2;

/// Seeds the initial weights: called before the first network is built.
PretrainOptions seeded(PretrainOptions options) {
  torch::manual_seed(options.seed);
  return options;
}

/// BatchNorm needs two images of each rank.
PretrainOptions with_enough_images(PretrainOptions options, const Ranks& ranks) {
  if (options.batch_size < 2 * ranks.count()) {
    throw UserError("--batch-size: got " + std::to_string(options.batch_size) + ", expected " +
                    std::to_string(2 * ranks.count()) + " or more, 2 images for each of the " +
                    std::to_string(ranks.count()) + " processes");
  }
  return options;
}

bool has_momentum_batch_norm(const torch::nn::Module& module) {
  const auto modules = module.modules();
  return std::any_of(modules.begin(), modules.end(), [](const auto& part) {
    return dynamic_cast<const momentum_bn::MomentumBatchNormLayer*>(part.get()) != nullptr;
  });
}

std::optional<at::ScalarType> dtype_of(Precision precision) {
  return precision == Precision::BFloat16 ? std::optional(at::kBFloat16) : std::nullopt;
}

Branch moved_to(at::Device device, Branch branch) {
  move_module(*branch, device);
  return branch;
}

void add_buffers(std::map<std::string, at::Tensor>& state, const std::string& prefix, const torch::nn::Module& module) {
  for (const auto& item : module.named_buffers()) {
    state.emplace(prefix + item.key(), item.value());
  }
}

void add_module(std::map<std::string, at::Tensor>& state, const std::string& prefix, const torch::nn::Module& module) {
  for (const auto& item : module.named_parameters()) {
    state.emplace(prefix + item.key(), item.value().detach());
  }
  add_buffers(state, prefix, module);
}

}  // namespace

Pretrainer::Pretrainer(const PretrainOptions& options, TrainingData data, const NormFactory& teacher_norm,
                       const Ranks& ranks, at::Device device)
    : ranks_(ranks),
      device_(device),
      upload_(device),
      data_(std::move(data)),
      options_(seeded(with_enough_images(resolve(options, data_.source->size(), data_.source->shape()), ranks))),
      share_(share_of_batch(options_.batch_size, ranks.rank(), ranks.count())),
      batches_(make_training_batches(data_, options_.augment, options_.batch_size, share_, options_.seed,
                                     *options_.steps * options_.accumulate, upload_.wants_pinned())),
      student_(moved_to(device, Branch(options_.model, BranchImpl::Side::Student, in_view_order(student_norm())))),
      teacher_(student_,
               moved_to(device, Branch(options_.model, BranchImpl::Side::Teacher,
                                       in_view_order(teacher_norm ? teacher_norm : own_teacher_norm()))),
               *options_.steps, options_.param_momentum),
      gradients_(ranks.alone() && options_.accumulate == 1
                     ? nullptr
                     : std::make_unique<GradientSum>(*student_, ranks, kViews, options_.accumulate)),
      optimiser_(*student_, options_.sgd_momentum, options_.weight_decay, options_.lars_trust_coefficient),
      threads_(device.is_cpu()) {}

NormFactory Pretrainer::student_norm() const {
  return options_.student_bn == StudentNorm::Torch ? batch_norm() : fused_batch_norm();
}

NormFactory Pretrainer::own_teacher_norm() const {
  switch (options_.bn) {
    case TeacherNorm::Batch:
      return batch_norm();
    case TeacherNorm::Eman:
      return evaluated_batch_norm();
    case TeacherNorm::Momentum:
      break;
  }
  return momentum_batch_norm(synchronised() ? std::optional(ranks_.process_group()) : std::nullopt,
                             kViews * options_.accumulate);
}

double Pretrainer::param_momentum() const {
  return momentum_bn::teacher_param_momentum(steps_done_, *options_.steps, options_.param_momentum);
}

void Pretrainer::update_teacher() {
  const double weight = 1 - param_momentum();
  teacher_.update();
  if (options_.bn != TeacherNorm::Eman) {
    return;
  }
  const auto of_student = student_->named_buffers();
  for (const auto& item : teacher_.model()->named_buffers()) {
    at::Tensor average = item.value();
    const at::Tensor& newest = of_student[item.key()];
    // The number of batches is no statistic.
    average.is_floating_point() ? average.lerp_(newest, weight) : average.copy_(newest);
  }
}

at::Tensor Pretrainer::make_view(const TrainingBatch& batch, int64_t number, int64_t which) const {
  const ViewPlace first{.seed = options_.seed, .batch = number, .view = which, .place = share_.first};
  const ViewDraw draw =
      draw_view(options_.augment, first, share_.count, data_.source->shape(), /*crop=*/!batch.cropped);
  return standardise_(augment(batch.views.at(static_cast<size_t>(which)), draw), data_.pixels);
}

void Pretrainer::upload(TrainingBatch& batch) {
  const bool same = batch.views[1].is_same(batch.views[0]);
  batch.views[0] = upload_(batch.views[0]);
  batch.views[1] = same ? batch.views[0] : upload_(batch.views[1]);
}

at::Tensor Pretrainer::add_gradients(TrainingBatch batch, int64_t number) {
  upload(batch);
  std::array<at::Tensor, kViews> views;
  std::array<at::Tensor, kViews> targets;
  const auto see_as_teacher = [&](int64_t view) {
    const ComputeDtype dtype(dtype_of(options_.precision));
    targets.at(view) = teacher_.forward(views.at(view));
  };
  threads_.run([&](int64_t view) {
    views.at(view) = make_view(batch, number, view);
    if (!synchronised()) {
      see_as_teacher(view);
    }
  });
  if (synchronised()) {
    // One view after the other: all ranks must meet in the same layers in the same order.
    Ranks::reach_others([&] {
      see_as_teacher(0);
      see_as_teacher(1);
    });
  }
  // A part of the mean over the step's images. A batch that is the whole step has the whole.
  const double weight = static_cast<double>(share_.count) / static_cast<double>(options_.images_per_step());
  std::array<at::Tensor, kViews> losses;
  threads_.run([&](int64_t view) {
    at::Tensor prediction;
    {
      const ComputeDtype dtype(dtype_of(options_.precision));
      prediction = student_(views.at(view));
    }
    at::Tensor loss = cosine_loss(prediction, targets.at(1 - view));
    losses.at(view) = loss.detach().to(at::kDouble).mul_(weight);
    if (weight != 1) {
      loss = loss * weight;
    }
    // Both views add to the same gradients, under a lock of torch's: two numbers have the same sum in either order.
    loss.backward();
  });
  return losses[0] + losses[1];
}

StepReport Pretrainer::step(bool stop) {
  StepReport report;
  report.step = steps_done_ + 1;
  report.learning_rate = learning_rate(steps_done_, *options_.steps, *options_.warmup_steps, *options_.learning_rate);
  report.param_momentum = param_momentum();
  report.bn_momentum =
      has_momentum_batch_norm(*teacher_.ptr()) ? momentum_bn::scheduled_momentum(steps_done_, *options_.steps) : 0;

  const int64_t first = steps_done_ * options_.accumulate;
  // Whatever torch could divide among its threads is done in here: threads of its own would be in the way of these.
  TrainingBatch batch;
  threads_.run([&](int64_t view) {
    if (view == 0) {
      batch = batches_->batch(first);
    } else {
      update_teacher();
    }
  });
  at::Tensor loss = add_gradients(batch, first);
  for (int64_t number = first + 1; number < first + options_.accumulate; ++number) {
    loss.add_(add_gradients(batches_->batch(number), number));
  }
  report.outcome = at::stack({loss, at::full({}, stop ? 1 : 0, loss.options())});
  ranks_.begin_sum(report.outcome)();
  if (gradients_) {
    gradients_->finish();
  }
  threads_.run([&](int64_t half) { optimiser_.step(report.learning_rate, half, 2); });

  ++steps_done_;
  return report;
}

std::map<std::string, at::Tensor> Pretrainer::state() const {
  std::map<std::string, at::Tensor> state;
  add_module(state, "student.", *student_);
  add_module(state, "teacher.", *teacher_.model());
  for (const auto& [name, velocity] : optimiser_.velocities()) {
    state.emplace("optimiser.velocity." + name, velocity);
  }
  state.emplace(kUpdatesEntry, teacher_->named_buffers(/*recurse=*/false)["updates"]);
  state.emplace(kStepEntry, at::scalar_tensor(steps_done_, at::kLong));
  return state;
}

std::map<std::string, at::Tensor> Pretrainer::own_state() const {
  std::map<std::string, at::Tensor> state;
  if (ranks_.alone() || synchronised()) {
    return state;
  }
  add_buffers(state, "teacher.", *teacher_.model());
  if (options_.bn == TeacherNorm::Eman) {
    add_buffers(state, "student.", *student_);
  }
  return state;
}

void Pretrainer::load_state(const std::map<std::string, at::Tensor>& state) {
  const std::map<std::string, at::Tensor> own = this->state();
  for (const auto& [name, tensor] : own) {
    const auto found = state.find(name);
    if (found == state.end()) {
      throw UserError("the saved run lacks '" + name + "'");
    }
    if (found->second.sizes() != tensor.sizes() || found->second.scalar_type() != tensor.scalar_type()) {
      throw UserError("the saved run's '" + name + "' is " + dtype_and_shape(found->second) + ", expected " +
                      dtype_and_shape(tensor));
    }
  }
  for (const auto& [name, tensor] : state) {
    if (!own.contains(name)) {
      throw UserError("the saved run has '" + name + "', which this one does not know");
    }
  }
  const auto step = state.at(kStepEntry).item<int64_t>();
  if (step < 0 || step > *options_.steps) {
    throw UserError("the saved run stands at step " + std::to_string(step) + ", expected 0 to " +
                    std::to_string(*options_.steps));
  }
  torch::NoGradGuard no_grad;
  for (const auto& [name, tensor] : own) {
    tensor.copy_(state.at(name));
  }
  steps_done_ = step;
}

}  // namespace m2teacher
