#include "commands/pretrain.h"

#include "checkpoint/checkpoint.h"
#include "checkpoint/run_folder.h"
#include "commands/stop_signal.h"
#include "commands/unreadable.h"
#include "data/load_dataset.h"
#include "device/choose_device.h"
#include "distributed/saved_ranks.h"
#include "distributed/together.h"
#include "error.h"
#include "eval/quick_knn.h"
#include "output/atomic_file.h"
#include "output/metrics.h"
#include "output/progress.h"
#include "output/standard_streams.h"
#include "text/printable.h"

#include <ATen/Parallel.h>

#include <chrono>
#include <cmath>
#include <iostream>
#include <memory>
#include <optional>
#include <sstream>
#include <vector>

namespace m2teacher {
namespace {

constexpr int64_t kStepsPerRow = 10;

/// A run that is under way.
struct Run {
  const RunSettings& settings;  ///< with nothing left open
  const Dataset& dataset;
  const TrainedOn& trained_on;
  const Ranks& ranks;
  Pretrainer& pretrainer;
  std::optional<RunFolder> folder;                     ///< of the first rank alone, as the metrics
  std::unique_ptr<MetricsFile> metrics;                ///< null: on the other ranks
  int64_t saved = -1;                                  ///< step of the newest checkpoint; -1: none
  std::vector<StepReport> unread;                      ///< of the steps since the device was last waited for
  std::chrono::steady_clock::time_point unread_since;  ///< when the first of these began
  double step_seconds = 0;                             ///< spent in steps by this process
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

void say_that_bits_may_differ(const char* what, int64_t now, int64_t before) {
  if (now != before) {
    std::cerr << what << ": " << now << " instead of " << before
              << ": results may differ from those of the uninterrupted run in their last bits\n";
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
/// @param saved  filled with what the checkpoint says of ranks
std::unique_ptr<MetricsFile> resume(const RunFolder& folder, const RunSettings& settings, const std::string& config,
                                    const TrainedOn& trained_on, int64_t ranks, Pretrainer& pretrainer,
                                    SavedRanks& saved) {
  const std::optional<Checkpoint> checkpoint = newest_checkpoint(folder.path(), std::cerr);
  if (!checkpoint) {
    if (!list_checkpoints(folder.path()).empty()) {
      throw UserError(folder.path().string() +
                      ": none of its checkpoints is whole; without them the run would start from the beginning");
    }
    std::cerr << printable(folder.path().string()) << ": no checkpoint yet: the run starts from the beginning\n";
    write_text_file(folder.config(), config);
    return std::make_unique<MetricsFile>(folder.metrics());
  }
  check_same_run(*checkpoint, settings, trained_on);
  say_that_bits_may_differ("--threads", settings.threads.value_or(0), checkpoint->settings.threads.value_or(0));
  saved = split_state(checkpoint->state, pretrainer.own_state());
  if (saved.count != ranks) {
    std::cerr << "processes: " << ranks << " instead of " << saved.count
              << ": each takes another share of the batch, so results differ from those of the uninterrupted run\n";
  }
  pretrainer.load_state(saved.state);
  MetricsState rows = checkpoint->metrics;
  if (!std::filesystem::exists(folder.metrics())) {
    std::cerr << printable(folder.metrics().string()) << ": is lost: a new one goes on after step "
              << pretrainer.steps_done() << '\n';
    const MetricsFile begun(folder.metrics());
    rows.rows = 0;
  }
  auto metrics = std::make_unique<MetricsFile>(folder.metrics(), rows);
  write_text_file(folder.config(), config);
  const int64_t step = pretrainer.steps_done();
  std::cerr << "resumed after step " << step
            << (step == pretrainer.total_steps() ? ", its last: the run is finished, there is nothing to do\n" : "\n");
  return metrics;
}

/// Adds a checkpoint and removes those beyond the ones to keep.
void write_checkpoint(const Run& run, int64_t step, const std::map<std::string, at::Tensor>& state) {
  const std::filesystem::path path = run.folder->checkpoint(step);
  run.folder->check_still_ours();
  run.metrics->flush();  // a checkpoint must find its rows again
  save_checkpoint(path, {.path = path,
                         .settings = run.settings,
                         .trained_on = run.trained_on,
                         .metrics = run.metrics->state(),
                         .state = state});
  run.folder->keep_last(run.settings.keep, step);
}

/// A checkpoint of the run as it stands, which all ranks take part in.
void save(Run& run) {
  const int64_t step = run.pretrainer.steps_done();
  const std::map<std::string, at::Tensor> state = gather_state(run.pretrainer, run.ranks);
  if (run.ranks.first()) {
    write_checkpoint(run, step, state);
  }
  run.saved = step;
}

bool look_due(const Run& run, int64_t step) {
  return run.settings.eval_every > 0 && (step % run.settings.eval_every == 0 || step == run.pretrainer.total_steps());
}

bool row_due(const Run& run, int64_t step) {
  return look_due(run, step) || step % kStepsPerRow == 0 || step == run.pretrainer.total_steps();
}

/// A row of metrics, with a look at the accuracy where one is due.
void write_row(Run& run, int64_t step) {
  run.folder->check_still_ours();
  run.metrics->write_row(
      step * run.settings.recipe.images_per_step(),
      look_due(run, step) ? quick_knn(run.pretrainer, run.dataset, run.settings.data.loader) : std::nullopt);
}

void do_step(Run& run, bool stop) {
  if (run.unread.empty()) {
    run.unread_since = std::chrono::steady_clock::now();
  }
  run.unread.push_back(run.pretrainer.step(stop));
}

/// Whether what the steps showed is to be read now. On the CPU that costs nothing, a device has to be waited for.
bool reading_due(const Run& run, int64_t step) {
  return run.pretrainer.device().is_cpu() || row_due(run, step) || step % run.settings.checkpoint_every == 0;
}

/// @throws UserError  on all ranks alike
void check_finite(const Run& run, const StepReport& report) {
  if (!std::isfinite(report.loss())) {
    together(run.ranks, [&] {
      throw UserError("the loss is no longer finite at step " + std::to_string(report.step) +
                      ": try a lower --learning-rate");
    });
  }
}

/// Reads what the steps since the last reading showed. @return whether a rank asked for the run to end
bool read_reports(Run& run, std::optional<Progress>& progress) {
  bool stop = false;
  run.unread.back().loss();  // waits for the device, which belongs to the steps' time
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - run.unread_since;
  const double seconds = took.count() / static_cast<double>(run.unread.size());  // of each
  for (const StepReport& report : run.unread) {
    check_finite(run, report);
    stop = stop || report.stop();
    if (run.ranks.first()) {
      run.metrics->add(report, run.settings.recipe.images_per_step(), seconds);
    }
  }
  if (run.ranks.first() && row_due(run, run.unread.back().step)) {
    write_row(run, run.unread.back().step);
  }
  for (const StepReport& report : run.unread) {
    run.step_seconds += seconds;
    if (progress) {
      progress->update(report.step, report.loss(), run.step_seconds);
    }
  }
  run.unread.clear();
  return stop;
}

std::string how_to_go_on(const Run& run) {
  // A path that begins with a dash would be taken for an option.
  const std::string folder = run.folder->path().string();
  const std::string command = "pretrain --resume " + shell_word(folder.starts_with('-') ? "./" + folder : folder);
  return run.ranks.alone() ? "go on with: m2teacher " + command
                           : "go on with torchrun as before and: -m momentum_bn.m2teacher " + command;
}

/// Trains to the end or until a signal stops it: one that this process got, or with several ranks any of them.
void train(Run& run, const StopSignal& stop) {
  const int64_t total = run.pretrainer.total_steps();
  std::optional<Progress> progress;
  if (run.ranks.first()) {
    progress.emplace(std::cerr, stderr_is_terminal(), total, run.settings.recipe.images_per_step());
  }
  bool stopping = run.ranks.alone() && stop.received();
  while (run.pretrainer.steps_done() < total && !stopping) {
    do_step(run, stop.received());
    const int64_t step = run.pretrainer.steps_done();
    stopping = run.ranks.alone() && stop.received();
    if (stopping || reading_due(run, step)) {
      stopping = read_reports(run, progress) || stopping;
    }
    if (step % run.settings.checkpoint_every == 0) {
      save(run);
    }
  }
  progress.reset();
  report_unreadable(*run.dataset.train);
  const int64_t step = run.pretrainer.steps_done();
  if (run.saved != step) {
    save(run);
  }
  if (!run.ranks.first()) {
    return;
  }
  if (step == total) {
    std::cout << run.folder->checkpoint(step).string() << '\n';
  } else {
    std::cout << "stopped after step " << step << " of " << total << "; " << how_to_go_on(run) << '\n';
  }
}

/// The first rank's settings, on all ranks, with nothing left open that does not depend on the images.
RunSettings settings_of_first(const PretrainCommand& command, const Ranks& ranks) {
  RunSettings settings = command.settings;
  std::string config;
  together(ranks, [&] {
    if (!ranks.first()) {
      return;
    }
    if (!command.resume && !command.overwrite) {
      refuse_to_overwrite(command.folder);  // before much is done
    }
    settings.data.spec.folder = std::filesystem::absolute(settings.data.spec.folder).lexically_normal();
    config = to_toml(settings);  // what cannot be kept is refused now, and not by the first checkpoint
  });
  if (!ranks.alone()) {
    settings = parse_toml(ranks.of_first(config), "the settings of rank 0");
  }
  at::set_num_threads(static_cast<int>(settings.threads.value_or(at::get_num_threads())));
  settings.threads = at::get_num_threads();
  return settings;
}

/// @throws UserError  other ranks compute elsewhere
void check_same_device(at::Device device, const Ranks& ranks) {
  const std::string ours = at::DeviceTypeName(device.type(), /*lower_case=*/true);
  const std::string of_first = ranks.of_first(ours);
  together(ranks, [&] {
    if (of_first != ours) {
      throw UserError("--device: got " + ours + " here, but " + of_first + " at rank 0, expected the same on all");
    }
  });
}

/// @throws UserError  other images than the first rank's
void check_same_images(const TrainedOn& images, const Ranks& ranks) {
  std::ostringstream ours;
  ours << describe(images) << std::hexfloat;
  for (const std::vector<double>* values : {&images.pixels.mean, &images.pixels.std}) {
    for (const double value : *values) {
      ours << ' ' << value;
    }
  }
  const std::string described = ranks.of_first(describe(images));
  const std::string exact = ranks.of_first(ours.str());
  together(ranks, [&] {
    if (exact != ours.str()) {
      throw UserError("--data: here are " + describe(images) + ", not the " + described + " that rank 0 has");
    }
  });
}

}  // namespace

void run_pretrain(const PretrainCommand& command, const Ranks& ranks) {
  const StopSignal stop;
  RunSettings settings = settings_of_first(command, ranks);
  ranks.set_timeout(std::chrono::milliseconds(std::llround(1000 * settings.process_timeout)));
  at::Device device = at::kCPU;
  together(ranks, [&] { device = choose_device(command.device, ranks); });
  check_same_device(device, ranks);

  Dataset dataset;
  TrainedOn trained_on;
  std::unique_ptr<Pretrainer> pretrainer;
  together(ranks, [&] {
    dataset = load_dataset(settings.data);
    if (ranks.first()) {
      warn(dataset.notes);
    }
    trained_on = {.images = dataset.train->size(), .shape = dataset.train->shape(), .pixels = dataset.pixels};
    const TrainingData data = {.source = dataset.train, .pixels = dataset.pixels, .loader = settings.data.loader};
    pretrainer = std::make_unique<Pretrainer>(settings.recipe, data, nullptr, ranks, device);
    settings.recipe = pretrainer->options();
  });
  check_same_images(trained_on, ranks);

  std::optional<RunFolder> folder;
  std::unique_ptr<MetricsFile> metrics;
  SavedRanks saved_ranks;
  together(ranks, [&] {
    if (!ranks.first()) {
      return;
    }
    const std::string config = to_toml(settings);
    folder.emplace(command.folder);
    metrics = command.resume ? resume(*folder, settings, config, trained_on, ranks.count(), *pretrainer, saved_ranks)
                             : start(*folder, config, command.overwrite);
  });
  spread_state(*pretrainer, ranks, saved_ranks.others);

  const int64_t saved = pretrainer->steps_done() > 0 ? pretrainer->steps_done() : -1;
  Run run{settings, dataset, trained_on, ranks, *pretrainer, std::move(folder), std::move(metrics), saved};
  try {
    train(run, stop);
  } catch (const UserError& error) {
    if (run.saved < 0 || !ranks.first() || !run.folder->is_still_ours() ||
        !std::filesystem::exists(run.folder->checkpoint(run.saved))) {
      throw;
    }
    throw UserError(std::string(error.what()) + "; step " + std::to_string(run.saved) + " is saved, " +
                    how_to_go_on(run));
  }
}

}  // namespace m2teacher
