// The trainer as a shared library with C functions, so that `python -m benchmarks.trainer` can time it in one process
// with its peers. Not installed.

#include "benchmark/identity_norm.h"
#include "benchmark/published_norm.h"
#include "data/load_dataset.h"
#include "settings/run_settings.h"
#include "training/pretrainer.h"

#include <c10/util/Exception.h>

#include <string>

namespace m2teacher {
namespace {

std::string& last_error() {
  static std::string error;
  return error;
}

NormFactory teacher_norm(const std::string& name) {
  if (name == "identity") {
    return identity_norm();
  }
  return name == "published" ? published_norm() : NormFactory();
}

/// The first batches of another, again and again, from memory: what a run costs without its loader.
class KeptBatches : public TrainingBatches {
 public:
  KeptBatches(TrainingBatches& batches, int64_t count) {
    for (int64_t step = 0; step < count; ++step) {
      kept_.push_back(batches.batch(step));
    }
  }
  TrainingBatch batch(int64_t step) override { return kept_[static_cast<size_t>(step) % kept_.size()]; }

 private:
  std::vector<TrainingBatch> kept_;
};

constexpr int64_t kKept = 4;
constexpr int64_t kEndlessSteps = 1'000'000;

/// A config.toml's recipe with another batch, in which nothing runs away in the few steps of a timing.
PretrainOptions endless_recipe(const std::string& config, int64_t batch_size) {
  PretrainOptions options = read_config(config).recipe;
  options.batch_size = batch_size;
  options.steps = kEndlessSteps;
  options.warmup_steps = kEndlessSteps;
  return options;
}

struct Trainer {
  Trainer(const DataOptions& data, const std::string& config, const std::string& norm, int64_t batch_size)
      : dataset(load_dataset(data)),
        options(endless_recipe(config, batch_size)),
        pretrainer(options, {.source = dataset.train, .pixels = dataset.pixels, .loader = data.loader},
                   teacher_norm(norm)) {}

  void keep_batches() {
    const TrainingData data{.source = dataset.train, .pixels = dataset.pixels, .loader = {}};
    const auto batches = make_training_batches(data, options.augment, options.batch_size, options.seed, kKept);
    pretrainer.set_batches(std::make_unique<KeptBatches>(*batches, kKept));
  }

  Dataset dataset;
  PretrainOptions options;
  Pretrainer pretrainer;
};

template <typename Call>
auto guarded(const Call& call, decltype(call()) otherwise) -> decltype(call()) {
  try {
    return call();
  } catch (const c10::Error& error) {
    last_error() = error.what_without_backtrace();
  } catch (const std::exception& error) {
    last_error() = error.what();
  }
  return otherwise;
}

}  // namespace

extern "C" {

/// @param data    as for --data
/// @param config  a config.toml with the recipe
/// @param norm    of the teacher: "momentum", "published" or "identity"
/// @param kept    whether a few batches are read once and used again and again
/// @return null on an error
__attribute__((visibility("default"))) void* m2teacher_create(const char* data, const char* config, const char* norm,
                                                              int64_t batch_size, int kept) {
  return guarded(
      [&]() -> void* {
        DataOptions options;
        options.spec = parse_data_spec(data);
        auto trainer = std::make_unique<Trainer>(options, config, norm, batch_size);
        if (kept != 0) {
          trainer->keep_batches();
        }
        return trainer.release();
      },
      nullptr);
}

/// Takes steps. @return the last one's loss; -1 on an error
__attribute__((visibility("default"))) double m2teacher_steps(void* trainer, int64_t count) {
  return guarded(
      [&] {
        double loss = 0;
        for (int64_t step = 0; step < count; ++step) {
          loss = static_cast<Trainer*>(trainer)->pretrainer.step().loss();
        }
        return loss;
      },
      -1.0);
}

__attribute__((visibility("default"))) void m2teacher_destroy(void* trainer) { delete static_cast<Trainer*>(trainer); }

/// What went wrong last.
__attribute__((visibility("default"))) const char* m2teacher_error() { return last_error().c_str(); }
}

}  // namespace m2teacher
