#include "settings/run_flags.h"

#include <limits>

namespace m2teacher {
namespace {

constexpr int64_t kWidestLayer = 1 << 16;
constexpr int64_t kMostStages = 8;
constexpr int64_t kMostBatches = 1 << 16;
constexpr int64_t kLargestPool = 64;
constexpr int64_t kSmallestSide = 8;
constexpr int64_t kLargestSide = 4096;
constexpr Range<double> kShare = {0, 1};

std::string text_of(const DataSpec& spec) { return to_string(spec); }
std::string text_of(const Architecture& architecture) { return to_string(architecture); }
std::string text_of(const std::optional<Stem>& stem) { return stem ? to_string(*stem) : ""; }
std::string text_of(const TeacherNorm& norm) { return to_string(norm); }
std::string text_of(const StudentNorm& norm) { return to_string(norm); }
std::string text_of(const Precision& precision) { return to_string(precision); }
std::string text_of(const Optimiser& optimiser) { return to_string(optimiser); }
std::optional<Stem> parse_known_stem(const std::string& word) { return parse_stem(word); }

void add_model_flags(Flags& flags, BranchOptions& model) {
  flags.group("Model");
  flags.word("--architecture", "small|resnet18|resnet50", model.encoder.architecture, parse_architecture, text_of,
             "The encoder; the small one is for images as small as MNIST's (paper)");
  flags.word("--stem", "standard|small", model.encoder.stem, parse_known_stem, text_of,
             "How a ResNet begins: 7x7 of stride 2 and a pool, or 3x3 of stride 1 (ours: small up to 64 pixels, as "
             "SimCLR, arXiv 2002.05709, appendix B.9)");
  flags.last()->default_str("by the image size");
  flags.numbers("--widths", model.encoder.widths, {1, kWidestLayer}, 1, kMostStages,
                "Channels of the small encoder's stages (ours)");
  flags.number("--pool", model.encoder.pool, {1, kLargestPool},
               "Fields per side of the grid that the small encoder's output is averaged to (ours)");
  flags.number("--projector-hidden", model.projector_hidden, {1, kWidestLayer},
               "Hidden units of the projector (paper)");
  flags.number("--predictor-hidden", model.predictor_hidden, {1, kWidestLayer},
               "Hidden units of the student's predictor (paper)");
  flags.number("--projector-out", model.projector_out, {1, kWidestLayer}, "Outputs of projector and predictor (paper)");
}

void add_augmentation_flags(Flags& flags, AugmentOptions& augment) {
  flags.group("Augmentation");
  flags.number("--min-area", augment.min_area, {0.001, 1},
               "Smallest area of the crop, as a share of the image's (BYOL)");
  flags.number("--max-area", augment.max_area, {0.001, 1}, "Largest area of the crop (BYOL)");
  flags.number("--max-aspect", augment.max_aspect, {1, 10},
               "Width / height of the crop is between 1 / this and this (BYOL)");
  flags.number("--flip", augment.flip, kShare, "Share of images mirrored left to right (BYOL)");
  flags.number("--jitter", augment.jitter, kShare, "Share of images whose colours are changed (BYOL)");
  flags.number("--brightness", augment.brightness, kShare, "Values times 1 +- this (BYOL)");
  flags.number("--contrast", augment.contrast, kShare, "Distance to the image's mean grey times 1 +- this (BYOL)");
  flags.number("--saturation", augment.saturation, kShare, "Distance to the pixel's grey times 1 +- this (BYOL)");
  flags.number("--hue", augment.hue, {0, 0.5}, "Hue turned by +- this, in turns (BYOL)");
  flags.number("--gamma", augment.gamma, {0, 5}, "Values to the power of e^[-this, this] (ours: the paper has none)");
  flags.number("--greyscale", augment.greyscale, kShare, "Share of images whose colours are taken away (BYOL)");
  flags.number("--min-blur-sigma", augment.min_blur_sigma, {0.01, 100},
               "Smallest standard deviation of the blur, in pixels of an image of 224 (BYOL)");
  flags.number("--max-blur-sigma", augment.max_blur_sigma, {0.01, 100},
               "Largest standard deviation of the blur (BYOL)");
  flags.pair("--blur", augment.views[0].blur, augment.views[1].blur, kShare,
             "Share of images blurred in the first and in the second view (BYOL)");
  flags.pair("--solarise", augment.views[0].solarise, augment.views[1].solarise, kShare,
             "Share of images solarised in the first and in the second view (BYOL)");
}

void add_training_flags(Flags& flags, PretrainOptions& recipe) {
  flags.group("Training");
  flags.number("--batch-size", recipe.batch_size, {2},
               "Images in a batch, of all processes together, each seen in two views (published code)");
  flags.number("--accumulate", recipe.accumulate, {1, kMostBatches},
               "Batches whose gradients make one step, for steps of more images than memory holds (ours)");
  flags.number("--epochs", recipe.epochs, {1e-6, 1e6}, "Passes over the images (paper)");
  flags.number("--steps", recipe.steps, {1}, "Training steps (ours)",
               "--epochs times the batches in them / --accumulate");
  flags.number("--warmup-epochs", recipe.warmup_epochs, {0, 1e6},
               "Passes over which the learning rate rises (published code)");
  flags.number("--warmup-steps", recipe.warmup_steps, {0}, "Steps over which the learning rate rises (ours)",
               "--warmup-epochs, at most a tenth of the steps");
  flags.number("--base-learning-rate", recipe.base_learning_rate, {0, 1000},
               "Peak of the learning rate at 256 images a step; scales with them (published code)");
  flags.number("--learning-rate", recipe.learning_rate, {0, 1000},
               "Peak of the learning rate, which then falls by a cosine (published code)",
               "--base-learning-rate * --batch-size * --accumulate / 256");
  flags.word("--optimizer", "sgd|lars", recipe.optimiser, parse_optimiser, text_of,
             "SGD with momentum (paper), or LARS, which scales the step of each weight that decays to its norm, for "
             "large batches (arXiv 1708.03888, as BYOL)");
  flags.number("--lars-trust-coefficient", recipe.lars_trust_coefficient, {1e-9, 1},
               "Norm of a weight's step in LARS as a share of the weight's, before learning rate and momentum (BYOL)",
               "0.001 with --optimizer lars");
  flags.number("--sgd-momentum", recipe.sgd_momentum, kShare, "Momentum of SGD and LARS (paper)");
  flags.number("--weight-decay", recipe.weight_decay, kShare,
               "Weight decay of all weights but biases and BatchNorm's (published code; leaving these out: BYOL)");
  flags.number("--param-momentum", recipe.param_momentum, kShare,
               "Weight of the teacher's own parameters in the first update; rises to 1 by a cosine (published code)");
  flags.word(
      "--bn", "momentum|batch|eman", recipe.bn, parse_teacher_norm, text_of,
      "The teacher's normalisation; for comparison batch: plain BatchNorm (paper), or eman: by running statistics "
      "that follow the student's as the parameters do (EMAN, arXiv 2101.08482)");
  flags.word("--student-bn", "fused|torch", recipe.student_bn, parse_student_norm, text_of,
             "Implementation of the student's BatchNorm: with residual and ReLU fused, or torch's, for comparison; the "
             "numbers are the same but for rounding (ours)");
  flags.flag("--synchronise-statistics", recipe.synchronise_statistics,
             "With several processes the teacher's normalisation takes the statistics of the whole batch; otherwise "
             "each process takes those of its images (paper)");
  flags.word("--precision", "fp32|bf16", recipe.precision, parse_precision, text_of,
             "Dtype in which convolutions and linear layers compute (ours)");
  add_seed_flag(flags, recipe.seed);
}

}  // namespace

void add_threads_flag(Flags& flags, std::optional<int64_t>& threads) {
  flags.number("--threads", threads, {1, 1024}, "CPU threads of the networks' arithmetic (ours)", "one per core");
  flags.changeable();
}

void add_seed_flag(Flags& flags, uint64_t& seed) {
  flags.number("--seed", seed, {0, std::numeric_limits<uint32_t>::max()}, "Seed of all random numbers (ours)");
}

void add_data_flags(Flags& flags, DataOptions& data) {
  flags.group("Data");
  flags.word(
      "--data", "KIND:FOLDER", data.spec, parse_data_spec, text_of,
      "Images: idx: the MNIST family's files; cifar10: its binary version; folder: JPEG and PNG below train/ and "
      "test/ or val/, or anywhere, labelled by sub-folder (ours: Debian's dataset-fashion-mnist)");
  flags.changeable();
  flags.number("--image-size", data.image_size, {kSmallestSide, kLargestSide},
               "Side of the square crops of a folder's images, in pixels (BYOL)");
  flags.number("--centre-crop", data.centre_crop, {0.01, 1},
               "Evaluation takes this share of a folder image's shorter side (BYOL)");
  flags.flag("--strict", data.strict, "Stop at an unreadable image; otherwise it is named and passed over (ours)");
  flags.changeable();
  flags.number("--max-pixels", data.max_pixels, {1},
               "Most pixels of an image file; one with more is unreadable (ours: Pillow's limit)");
  flags.number("--loader-threads", data.loader.threads, {0, 1024}, "Threads that read images; 0: one per core (ours)");
  flags.changeable();
  flags.number("--batches-ahead", data.loader.batches_ahead, {1, 1024}, "Batches read ahead, at most (ours)");
  flags.changeable();
  flags.number("--loader-timeout", data.loader.timeout_seconds, {1, 1e6},
               "Seconds without an image after which the loader gives up (ours)");
  flags.changeable();
}

void add_recipe_flags(Flags& flags, PretrainOptions& recipe) {
  add_model_flags(flags, recipe.model);
  add_augmentation_flags(flags, recipe.augment);
  add_training_flags(flags, recipe);
}

void add_run_flags(Flags& flags, RunSettings& settings) {
  add_data_flags(flags, settings.data);
  add_recipe_flags(flags, settings.recipe);
  flags.group("Run");
  flags.number("--eval-every", settings.eval_every, {0},
               "Steps between two measurements of the teacher's kNN accuracy on a few images; 0: none (ours)");
  flags.changeable();
  flags.number("--checkpoint-every", settings.checkpoint_every, {1}, "Steps between two checkpoints (ours)");
  flags.changeable();
  flags.number("--process-timeout", settings.process_timeout, {1, 1e6},
               "Seconds that a process waits for the others, where there are several (ours)");
  flags.changeable();
  flags.number("--keep", settings.keep, {1}, "Checkpoints kept (ours)");
  flags.changeable();
}

}  // namespace m2teacher
