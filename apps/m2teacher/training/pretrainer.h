#pragma once

#include "data/training_batches.h"
#include "device/upload.h"
#include "distributed/ranks.h"
#include "models/branch.h"
#include "training/gradient_sum.h"
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
  double learning_rate = 0;
  double param_momentum = 0;  ///< weight of the teacher's own parameters in this step's update
  double bn_momentum = 0;     ///< weight of the batch in the teacher's normalisation
  at::Tensor outcome;         ///< (2), float64, of the device: the loss, and how many ranks asked for the run to end

  // Both wait for the device.
  double loss() const {
    return outcome[0].item<double>();
  }  ///< 4 - 2 (q1 . k2 + q2 . k1), mean over the images: 0 to 8
  bool stop() const { return outcome[1].item<double>() > 0; }
};

/// Momentum^2 Teacher (arXiv 2101.07525): a student with a predictor learns to predict, from one view of an image, what
/// a teacher says of the other. The teacher's parameters and its normalisation's statistics follow by momentum.
///
/// After the initial weights every random number is a function of the seed, the number of the batch and the image's
/// place in it. So a run that is taken up again by `load_state` goes on bit for bit, for a given number of threads and
/// ranks.
///
/// All of it happens on one device but for drawing random numbers, so that a run's images and crops are the same on
/// each. On a GPU no step waits for the device: what reads from it is its report.
///
/// With several ranks each takes a share of the batch. The gradients of all are added up, so that the parameters stay
/// the same on all, bit for bit. The student's normalisation takes the statistics of the rank's share; the teacher's,
/// too, or those of the whole batch, as the options say.
class Pretrainer {
 public:
  /// @param options       what is open in them is resolved, see `options()`
  /// @param teacher_norm  normalisation of the teacher, in place of the one that the options name
  /// @param ranks         all build theirs alike
  /// @param device        where they compute: the CPU, a GPU, or meta
  /// @throws UserError
  Pretrainer(const PretrainOptions& options, TrainingData data, const NormFactory& teacher_norm = nullptr,
             const Ranks& ranks = {}, at::Device device = at::kCPU);

  /// @param stop  asks for the run to end: all ranks learn of it by the report
  /// @throws UserError  an image could not be read, or another rank is lost
  StepReport step(bool stop = false);

  /// Other batches than the images' own, for measurements.
  void set_batches(std::unique_ptr<TrainingBatches> batches) { batches_ = std::move(batches); }

  /// The resolved ones.
  const PretrainOptions& options() const { return options_; }
  const PixelStatistics& pixels() const { return data_.pixels; }
  int64_t total_steps() const { return *options_.steps; }
  int64_t steps_done() const { return steps_done_; }
  at::Device device() const { return device_; }
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
  /// The tensors are the run's own, on its device, not copies: the next step changes them.
  std::map<std::string, at::Tensor> state() const;

  /// Of this state what each rank has for itself, and the rest of the run depends on: the teacher's buffers, unless its
  /// statistics are synchronised or there is one rank, and the student's where the teacher's follow them.
  std::map<std::string, at::Tensor> own_state() const;

  /// Takes up a run where `state()` found it. Names, shapes and dtypes are checked first.
  /// @throws UserError  naming the first entry that is missing, unknown or of another shape or dtype, or a step beyond
  /// the run's end; nothing is changed
  void load_state(const std::map<std::string, at::Tensor>& state);

 private:
  /// One view of a batch of images: (B, C, H, W), standardised.
  at::Tensor make_view(const TrainingBatch& batch, int64_t number, int64_t which) const;
  /// Brings a batch to the device.
  void upload(TrainingBatch& batch);
  /// Adds the gradients of a batch to those of the step. @return (), float64: this rank's part of the loss
  at::Tensor add_gradients(TrainingBatch batch, int64_t number);
  /// Whether the teacher's forwards wait for other ranks.
  bool synchronised() const { return options_.synchronise_statistics && !ranks_.alone(); }
  NormFactory student_norm() const;
  NormFactory own_teacher_norm() const;
  /// Weight of the teacher's own parameters in the next update. The teacher's own number of updates lies on the device.
  double param_momentum() const;
  /// Parameters and, with EMAN, statistics of the teacher follow the student's.
  void update_teacher();

  Ranks ranks_;
  at::Device device_;
  Upload upload_;
  TrainingData data_;
  PretrainOptions options_;
  BatchShare share_;
  std::unique_ptr<TrainingBatches> batches_;
  Branch student_;
  momentum_bn::MomentumTeacher<Branch> teacher_;
  std::unique_ptr<GradientSum> gradients_;  // null: one rank and one batch a step
  Sgd optimiser_;
  ViewThreads threads_;
  int64_t steps_done_ = 0;
};

}  // namespace m2teacher
