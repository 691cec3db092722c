#pragma once

#include "data/augment.h"
#include "data/batch_sampler.h"
#include "models/branch.h"
#include "training/sgd.h"

#include <momentum_bn/teacher.h>

#include <filesystem>

namespace m2teacher {

/// The recipe. The defaults train on Fashion-MNIST within three minutes on two cores.
struct PretrainOptions {
  BranchOptions model;
  AugmentOptions augment;
  int64_t steps = 3000;
  int64_t batch_size = 32;
  int64_t warmup_steps = 50;
  double learning_rate = 0.1;
  double sgd_momentum = 0.9;
  double weight_decay = 1e-4;
  double param_momentum = 0.97;  ///< weight of the teacher's own parameters in the first update
  uint64_t seed = 0;
};

/// What one step showed.
struct StepReport {
  int64_t step = 0;  ///< 1 for the first
  double loss = 0;   ///< 4 - 2 (q1 . k2 + q2 . k1), mean over the batch: 0 to 8
  double learning_rate = 0;
  double param_momentum = 0;  ///< weight of the teacher's own parameters in this step's update
  double bn_momentum = 0;     ///< weight of the batch in the teacher's normalisation
};

/// Momentum^2 Teacher (arXiv 2101.07525): a student with a predictor learns to predict, from one view of an image, what
/// a teacher says of the other. The teacher's parameters and its normalisation's statistics follow by momentum.
class Pretrainer {
 public:
  /// @param images        (N, C, H, W), uint8
  /// @param teacher_norm  normalisation of the teacher
  Pretrainer(const PretrainOptions& options, at::Tensor images,
             const NormFactory& teacher_norm = momentum_batch_norm());

  StepReport step();

  const PretrainOptions& options() const { return options_; }
  int64_t steps_done() const { return steps_done_; }
  Branch& student() { return student_; }
  const momentum_bn::MomentumTeacher<Branch>& teacher() const { return teacher_; }

 private:
  /// Two views of a batch of images: (2 B, C, H, W), standardised, the first views first.
  at::Tensor next_views();

  PretrainOptions options_;
  at::Tensor images_;
  BatchSampler sampler_;
  at::Generator augment_generator_;
  Branch student_;
  momentum_bn::MomentumTeacher<Branch> teacher_;
  Sgd optimiser_;
  int64_t steps_done_ = 0;
};

}  // namespace m2teacher
