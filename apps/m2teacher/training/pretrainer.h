#pragma once

#include "data/training_batches.h"
#include "models/branch.h"
#include "training/options.h"
#include "training/sgd.h"
#include "training/view_threads.h"

#include <momentum_bn/teacher.h>

#include <array>
#include <map>
#include <memory>
#include <string>

namespace m2teacher {

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
///
/// After the initial weights every random number is a function of the seed, the step and the image's place in the
/// batch. So a run that is taken up again by `load_state` goes on bit for bit, for a given number of threads.
class Pretrainer {
 public:
  /// @param options       what is open in them is resolved, see `options()`
  /// @param teacher_norm  normalisation of the teacher, in place of the one that the options name
  /// @throws UserError
  Pretrainer(const PretrainOptions& options, TrainingData data, const NormFactory& teacher_norm = nullptr);

  /// @throws UserError  an image could not be read
  StepReport step();

  /// Other batches than the images' own, for measurements.
  void set_batches(std::unique_ptr<TrainingBatches> batches) { batches_ = std::move(batches); }

  /// The resolved ones.
  const PretrainOptions& options() const { return options_; }
  const PixelStatistics& pixels() const { return data_.pixels; }
  int64_t total_steps() const { return *options_.steps; }
  int64_t steps_done() const { return steps_done_; }
  Branch& student() { return student_; }
  const momentum_bn::MomentumTeacher<Branch>& teacher() const { return teacher_; }

  /// Everything that the rest of the run depends on, beside the options and the images:
  ///
  /// | name                      | what it is                                                                    |
  /// | ------------------------- | ----------------------------------------------------------------------------- |
  /// | student.*                 | parameters and buffers of the student                                         |
  /// | teacher.*                 | of the teacher, with its layers' schedules and unfinished updates             |
  /// | teacher_updates           | (), int64: updates of the teacher's parameters                                |
  /// | optimiser.velocity.*      | (as the student's parameters), float32                                        |
  /// | step                      | (), int64: steps done; epoch and place in it follow from it                   |
  ///
  /// The tensors are the run's own, not copies: the next step changes them.
  std::map<std::string, at::Tensor> state() const;

  /// Takes up a run where `state()` found it. Names, shapes and dtypes are checked first.
  /// @throws UserError  naming the first entry that is missing, unknown or of another shape or dtype, or a step beyond
  /// the run's end; nothing is changed
  void load_state(const std::map<std::string, at::Tensor>& state);

 private:
  /// One view of a batch of images: (B, C, H, W), standardised.
  at::Tensor make_view(const TrainingBatch& batch, int64_t which) const;

  TrainingData data_;
  PretrainOptions options_;
  std::unique_ptr<TrainingBatches> batches_;
  Branch student_;
  momentum_bn::MomentumTeacher<Branch> teacher_;
  Sgd optimiser_;
  ViewThreads threads_;
  int64_t steps_done_ = 0;
};

}  // namespace m2teacher
