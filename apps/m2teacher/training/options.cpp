#include "training/options.h"

#include "error.h"
#include "words.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

namespace m2teacher {
namespace {

constexpr Words<TeacherNorm, 3> kTeacherNorms = {
    {{TeacherNorm::Momentum, "momentum"}, {TeacherNorm::Batch, "batch"}, {TeacherNorm::Eman, "eman"}}};
constexpr Words<StudentNorm, 2> kStudentNorms = {{{StudentNorm::Fused, "fused"}, {StudentNorm::Torch, "torch"}}};
constexpr Words<Precision, 2> kPrecisions = {{{Precision::Float32, "fp32"}, {Precision::BFloat16, "bf16"}}};
constexpr Words<Optimiser, 2> kOptimisers = {{{Optimiser::Sgd, "sgd"}, {Optimiser::Lars, "lars"}}};

constexpr int64_t kSmallSide = 64;
constexpr double kLearningRateBatch = 256;
constexpr double kLargestLearningRate = 1000;   // that --learning-rate takes
constexpr double kLarsTrustCoefficient = 1e-3;  // BYOL's
constexpr int64_t kLargestWarmupShare = 10;     // the paper's: 10 of 100 epochs

std::string text(double value) {
  std::ostringstream stream;
  stream << value;
  return stream.str();
}

void require(bool met, const std::string& option, const std::string& got, const std::string& expected) {
  if (!met) {
    throw UserError(option + ": got " + got + ", expected " + expected);
  }
}

void require_order(const std::string& low_name, double low, const std::string& high_name, double high) {
  require(low <= high, low_name, text(low), "at most " + high_name + " (" + text(high) + ")");
}

void check(const PretrainOptions& options, int64_t images) {
  require(options.batch_size >= 2, "--batch-size", std::to_string(options.batch_size), "2 or more");
  if (options.batch_size > images) {
    throw UserError("--batch-size: " + std::to_string(options.batch_size) + " is more than the " +
                    std::to_string(images) + " training images");
  }
  require(options.accumulate >= 1, "--accumulate", std::to_string(options.accumulate), "1 or more");
  require(options.steps.value_or(1) >= 1, "--steps", std::to_string(options.steps.value_or(1)), "1 or more");
  require(options.epochs > 0, "--epochs", text(options.epochs), "more than 0");
  require(!options.model.encoder.widths.empty(), "--widths", "none", "one or more");
  require(!options.synchronise_statistics || options.bn == TeacherNorm::Momentum, "--synchronise-statistics",
          "--bn " + to_string(options.bn), "--bn momentum");
  require(!options.lars_trust_coefficient || options.optimiser == Optimiser::Lars, "--lars-trust-coefficient",
          "--optimizer " + to_string(options.optimiser), "--optimizer lars");
  require_order("--min-area", options.augment.min_area, "--max-area", options.augment.max_area);
  require_order("--min-blur-sigma", options.augment.min_blur_sigma, "--max-blur-sigma", options.augment.max_blur_sigma);
}

}  // namespace

std::string to_string(TeacherNorm norm) { return word_of(kTeacherNorms, norm); }
std::string to_string(StudentNorm norm) { return word_of(kStudentNorms, norm); }
std::string to_string(Precision precision) { return word_of(kPrecisions, precision); }
std::string to_string(Optimiser optimiser) { return word_of(kOptimisers, optimiser); }
TeacherNorm parse_teacher_norm(const std::string& word) { return parse_word("--bn", kTeacherNorms, word); }
StudentNorm parse_student_norm(const std::string& word) { return parse_word("--student-bn", kStudentNorms, word); }
Precision parse_precision(const std::string& word) { return parse_word("--precision", kPrecisions, word); }
Optimiser parse_optimiser(const std::string& word) { return parse_word("--optimizer", kOptimisers, word); }

PretrainOptions resolve(PretrainOptions options, int64_t images, const ImageShape& shape) {
  check(options, images);
  EncoderOptions& encoder = options.model.encoder;
  encoder.in_channels = shape.channels;
  if (!encoder.stem) {
    encoder.stem = std::max(shape.height, shape.width) <= kSmallSide ? Stem::Small : Stem::Standard;
  }
  const int64_t whole_batches = images / options.batch_size;
  const double steps_per_epoch = static_cast<double>(whole_batches) / static_cast<double>(options.accumulate);
  if (!options.steps) {
    options.steps = std::max<int64_t>(1, std::llround(options.epochs * steps_per_epoch));
  }
  if (!options.warmup_steps) {
    options.warmup_steps =
        std::min<int64_t>(std::llround(options.warmup_epochs * steps_per_epoch), *options.steps / kLargestWarmupShare);
  }
  const int64_t most_steps = std::numeric_limits<int64_t>::max() / options.accumulate;
  require(*options.steps <= most_steps, "--steps", std::to_string(*options.steps),
          "at most " + std::to_string(most_steps) + " with --accumulate " + std::to_string(options.accumulate));
  require(*options.warmup_steps <= *options.steps, "--warmup-steps", std::to_string(*options.warmup_steps),
          "at most the " + std::to_string(*options.steps) + " steps");
  if (!options.learning_rate) {
    options.learning_rate =
        options.base_learning_rate * static_cast<double>(options.images_per_step()) / kLearningRateBatch;
  }
  require(*options.learning_rate <= kLargestLearningRate, "--base-learning-rate",
          text(options.base_learning_rate) + " for 256 images, which is " + text(*options.learning_rate) + " for the " +
              std::to_string(options.images_per_step()) + " of a step",
          "at most " + text(kLargestLearningRate) + " for these");
  if (options.optimiser == Optimiser::Lars && !options.lars_trust_coefficient) {
    options.lars_trust_coefficient = kLarsTrustCoefficient;
  }
  return options;
}

}  // namespace m2teacher
