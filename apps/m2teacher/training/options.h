#pragma once

#include "data/augment_options.h"
#include "data/image_source.h"
#include "models/branch.h"

#include <cstdint>
#include <optional>
#include <string>

namespace m2teacher {

/// Normalisation of the teacher.
enum class TeacherNorm {
  Momentum,  ///< "momentum": Momentum BatchNorm, the paper's
  Batch,     ///< "batch": BatchNorm, for comparison
  Eman,      ///< "eman": by averages of the student's running statistics (arXiv 2101.08482), for comparison
};

/// Normalisation of the student: BatchNorm, by one of two implementations.
enum class StudentNorm {
  Fused,  ///< "fused": momentum_bn's, with residual and ReLU in its passes
  Torch,  ///< "torch": torch's, for comparison
};

/// What the networks compute in. Parameters, statistics, averages and the optimiser are float32 in either case.
enum class Precision {
  Float32,   ///< "fp32"
  BFloat16,  ///< "bf16": convolutions and linear layers in bfloat16, by torch's autocast
};

/// How gradients move the student's parameters.
enum class Optimiser {
  Sgd,   ///< "sgd": with momentum
  Lars,  ///< "lars": with momentum and a step of each weight in proportion to its norm (arXiv 1708.03888)
};

/// The word for it. `parse_*` throw UserError for an unknown one.
std::string to_string(TeacherNorm norm);
std::string to_string(StudentNorm norm);
std::string to_string(Precision precision);
std::string to_string(Optimiser optimiser);
TeacherNorm parse_teacher_norm(const std::string& word);
StudentNorm parse_student_norm(const std::string& word);
Precision parse_precision(const std::string& word);
Optimiser parse_optimiser(const std::string& word);

/// The recipe. Defaults are those of the paper (arXiv 2101.07525, section 4.1) as its published code has them
/// (github.com/zengarden/momentum2-teacher, exps/arxiv), the learning rate scaled to the batch.
struct PretrainOptions {
  BranchOptions model;
  AugmentOptions augment;
  TeacherNorm bn = TeacherNorm::Momentum;
  StudentNorm student_bn = StudentNorm::Fused;
  Precision precision = Precision::Float32;
  int64_t batch_size = 256;             ///< images that go through the networks at a time, each seen in two views
  int64_t accumulate = 1;               ///< batches whose gradients one step takes the mean of
  double epochs = 100;                  ///< passes over the images
  std::optional<int64_t> steps;         ///< unset: `epochs` passes of whole batches
  double warmup_epochs = 10;            ///< over which the learning rate rises
  std::optional<int64_t> warmup_steps;  ///< unset: `warmup_epochs`, but no more than a tenth of the steps
  double base_learning_rate = 0.05;     ///< for steps of 256 images; scales with them
  std::optional<double> learning_rate;  ///< peak of the cosine; unset: base_learning_rate * images_per_step() / 256
  Optimiser optimiser = Optimiser::Sgd;
  std::optional<double> lars_trust_coefficient;  ///< unset: 0.001 with LARS, which alone has one
  double sgd_momentum = 0.9;
  double weight_decay = 1e-4;  ///< of all weights; biases and BatchNorm's parameters do not decay
  /// With several processes: whether the teacher's normalisation takes the statistics of the whole batch; otherwise
  /// each process takes those of its share.
  bool synchronise_statistics = false;
  double param_momentum = 0.99;  ///< weight of the teacher's own parameters in the first update; rises to 1
  uint64_t seed = 0;

  int64_t images_per_step() const { return batch_size * accumulate; }
};

/// The recipe with nothing left open: everything that depends on the images or on other options is set.
/// `resolve(resolve(o, ...), ...)` is `resolve(o, ...)`.
/// @throws UserError  an option, named as on the command line, that is out of range or does not fit the images
PretrainOptions resolve(PretrainOptions options, int64_t images, const ImageShape& shape);

}  // namespace m2teacher
