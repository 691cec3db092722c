#include "commands/pretrain.h"

#include "checkpoint/checkpoint.h"
#include "checkpoint/run_folder.h"
#include "commands/stop_signal.h"
#include "commands/unreadable.h"
#include "data/load_dataset.h"
#include "error.h"
#include "eval/quick_knn.h"
#include "output/atomic_file.h"
#include "output/metrics.h"
#include "output/progress.h"

#include <ATen/Parallel.h>

#include <unistd.h>

#include <chrono>
#include <cmath>
#include <iostream>
#include <memory>
#include <optional>

namespace m2teacher {
namespace {

constexpr int64_t kStepsPerRow = 10;

/// A run that is under way.
struct Run {
  const RunSettings& settings;  ///< with nothing left open
  const Dataset& dataset;
  const TrainedOn& trained_on;
  const RunFolder& folder;
  Pretrainer& pretrainer;
  MetricsFile& metrics;
  int64_t saved;  ///< step of the newest checkpoint; -1: none
};

void refuse_to_overwrite(const std::filesystem::path& folder) {
  if (holds_run(folder)) {
    throw UserError(folder.string() + ": holds a run already: go on with it by --resume, or give --overwrite");
  }
}

/// @throws UserError  the first difference, by name
void check_same_run(const Checkpoint& checkpoint, const RunSettings& settings, const TrainedOn& trained_on) {
  const std::vector<NamedValue> ours = fixed_settings(settings);
  const std::vector<NamedValue> theirs = fixed_settings(checkpoint.settings);
  for (size_t i = 0; i < ours.size(); ++i) {
    if (ours[i].value != theirs[i].value) {
      throw UserError(checkpoint.path.string() + ": a checkpoint of another run: --" + ours[i].name + " is " +
                      theirs[i].value + " there, " + ours[i].value + " in this run's " + kConfigFile);
    }
  }
  if (checkpoint.trained_on != trained_on) {
    const std::string there = describe(checkpoint.trained_on);
    const std::string here = describe(trained_on);
    throw UserError("--data: not the images that the run was started with: " +
                    (there != here ? "there are " + here + ", there were " + there
                                   : "their pixels have another mean or standard deviation"));
  }
}

/// @param config  text of config.toml
std::unique_ptr<MetricsFile> start(const RunFolder& folder, const std::string& config, bool overwrite) {
  if (overwrite) {
    folder.clear();
  }
  refuse_to_overwrite(folder.path());
  write_text_file(folder.config(), config);
  return std::make_unique<MetricsFile>(folder.metrics());
}

/// Takes up the run where its newest whole checkpoint left it. One that has none yet starts from the beginning.
std::unique_ptr<MetricsFile> resume(const RunFolder& folder, const RunSettings& settings, const std::string& config,
                                    const TrainedOn& trained_on, Pretrainer& pretrainer) {
  const std::optional<Checkpoint> checkpoint = newest_checkpoint(folder.path(), std::cerr);
  if (!checkpoint) {
    if (!list_checkpoints(folder.path()).empty()) {
      throw UserError(folder.path().string() +
                      ": none of its checkpoints is whole; without them the run would start from the beginning");
    }
    std::cerr << folder.path().string() << ": no checkpoint yet: the run starts from the beginning\n";
    write_text_file(folder.config(), config);
    return std::make_unique<MetricsFile>(folder.metrics());
  }
  check_same_run(*checkpoint, settings, trained_on);
  if (checkpoint->settings.threads != settings.threads) {
    std::cerr << "--threads: " << settings.threads.value_or(0) << " instead of "
              << checkpoint->settings.threads.value_or(0)
              << ": results may differ from those of the uninterrupted run in their last bits\n";
  }
  pretrainer.load_state(checkpoint->state);
  auto metrics = std::make_unique<MetricsFile>(folder.metrics(), checkpoint->metrics);
  write_text_file(folder.config(), config);
  std::cerr << "resumed after step " << pretrainer.steps_done() << '\n';
  return metrics;
}

/// Adds a checkpoint and removes those beyond the ones to keep.
void save(Run& run) {
  const int64_t step = run.pretrainer.steps_done();
  const std::filesystem::path path = run.folder.checkpoint(step);
  run.metrics.flush();  // a checkpoint must find its rows again
  save_checkpoint(path, {.path = path,
                         .settings = run.settings,
                         .trained_on = run.trained_on,
                         .metrics = run.metrics.state(),
                         .state = run.pretrainer.state()});
  run.saved = step;
  run.folder.keep_last(run.settings.keep, step);
}

/// One step, its metrics, and a look at the accuracy where one is due.
StepReport do_step(Run& run) {
  const auto start = std::chrono::steady_clock::now();
  const StepReport report = run.pretrainer.step();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (!std::isfinite(report.loss)) {
    throw UserError("the loss is no longer finite at step " + std::to_string(report.step) +
                    ": try a lower --learning-rate");
  }
  run.metrics.add(report, run.settings.recipe.batch_size, seconds);
  const bool last = report.step == run.pretrainer.total_steps();
  const bool look = run.settings.eval_every > 0 && (report.step % run.settings.eval_every == 0 || last);
  if (look || report.step % kStepsPerRow == 0 || last) {
    run.metrics.write_row(report.step * run.settings.recipe.batch_size,
                          look ? quick_knn(run.pretrainer, run.dataset, run.settings.data.loader) : std::nullopt);
  }
  return report;
}

std::string how_to_go_on(const Run& run) {
  return "go on with: m2teacher pretrain --resume " + run.folder.path().string();
}

/// Trains to the end or until a signal stops it.
void train(Run& run, const StopSignal& stop) {
  const int64_t total = run.pretrainer.total_steps();
  Progress progress(std::cerr, isatty(STDERR_FILENO) != 0, total, run.settings.recipe.batch_size);
  while (run.pretrainer.steps_done() < total && !stop.received()) {
    const StepReport report = do_step(run);
    progress.update(report.step, report.loss);
    if (report.step % run.settings.checkpoint_every == 0) {
      save(run);
    }
  }
  progress.end();
  report_unreadable(*run.dataset.train);
  const int64_t step = run.pretrainer.steps_done();
  if (run.saved != step) {
    save(run);
  }
  if (step == total) {
    std::cout << run.folder.checkpoint(step).string() << '\n';
  } else {
    std::cout << "stopped after step " << step << " of " << total << "; " << how_to_go_on(run) << '\n';
  }
}

}  // namespace

void run_pretrain(const PretrainCommand& command) {
  const StopSignal stop;
  if (!command.resume && !command.overwrite) {
    refuse_to_overwrite(command.folder);  // before much is done
  }
  RunSettings settings = command.settings;
  at::set_num_threads(static_cast<int>(settings.threads.value_or(at::get_num_threads())));
  settings.threads = at::get_num_threads();
  settings.data.spec.folder = std::filesystem::absolute(settings.data.spec.folder).lexically_normal();
  const Dataset dataset = load_dataset(settings.data);
  Pretrainer pretrainer(settings.recipe,
                        {.source = dataset.train, .pixels = dataset.pixels, .loader = settings.data.loader});
  settings.recipe = pretrainer.options();
  const std::string config = to_toml(settings);
  const TrainedOn trained_on = {
      .images = dataset.train->size(), .shape = dataset.train->shape(), .pixels = dataset.pixels};

  const RunFolder folder(command.folder);
  const std::unique_ptr<MetricsFile> metrics = command.resume ? resume(folder, settings, config, trained_on, pretrainer)
                                                              : start(folder, config, command.overwrite);
  const int64_t saved = pretrainer.steps_done() > 0 ? pretrainer.steps_done() : -1;
  Run run{settings, dataset, trained_on, folder, pretrainer, *metrics, saved};
  try {
    train(run, stop);
  } catch (const UserError& error) {
    if (run.saved < 0) {
      throw;
    }
    throw UserError(std::string(error.what()) + "; step " + std::to_string(run.saved) + " is saved, " +
                    how_to_go_on(run));
  }
}

}  // namespace m2teacher
