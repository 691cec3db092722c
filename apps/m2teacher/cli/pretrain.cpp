#include "commands/pretrain.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/run_folder.h"
#include "cli/commands.h"
#include "cli/encoder_options.h"
#include "commands/dry_run.h"
#include "error.h"
#include "settings/run_flags.h"
#include "text/printable.h"

#include <CLI/CLI.hpp>

#include <iostream>
#include <memory>
#include <string>

namespace m2teacher {
namespace {

/// What the command line says of pretrain.
struct PretrainArguments {
  explicit PretrainArguments(CLI::App& command) : flags(command) {
    add_run_flags(flags, settings);
    add_device(command, device, "a dry run of --steps, which writes nothing");
  }

  RunSettings settings;
  Flags flags;
  std::string device = "auto";
  std::filesystem::path out;
  std::filesystem::path resume;
  bool overwrite = false;
  bool or_resume = false;
};

/// Those in config.toml, or where that is lost those in the newest checkpoint.
RunSettings saved_settings(const std::filesystem::path& folder) {
  if (std::filesystem::exists(folder / kConfigFile)) {
    return read_config(folder / kConfigFile);
  }
  const std::optional<Checkpoint> newest = newest_checkpoint(folder, std::cerr);
  if (!newest) {
    throw UserError(folder.string() + ": holds no run to go on with (there is no " + kConfigFile + ")");
  }
  std::cerr << printable((folder / kConfigFile).string()) << ": is lost: the settings are those of "
            << printable(newest->path.filename().string()) << '\n';
  return newest->settings;
}

/// The settings of the run in the folder, with what was given in place of what a resumed run may change.
/// @throws UserError  something was given that it may not change
RunSettings resumed_settings(const PretrainArguments& arguments, const std::filesystem::path& folder,
                             const std::optional<int64_t>& threads) {
  RunSettings settings = saved_settings(folder);
  CLI::App same_options;
  Flags saved(same_options);
  add_run_flags(saved, settings);
  for (size_t i = 0; i < saved.all().size(); ++i) {
    const Flag& given = arguments.flags.all()[i];
    const Flag& kept = saved.all()[i];
    if (given.given() && !given.changeable && given.text() != kept.text()) {
      throw UserError("--" + given.name() + ": got " + given.text() + ", but the run in " + folder.string() +
                      " was started with " + kept.text() + ", which it keeps");
    }
  }
  saved.set_given(arguments.flags);
  if (threads) {
    settings.threads = threads;
  }
  return settings;
}

/// @param reads_folder  whether the folder of the run is this process's to read
PretrainCommand command_of(const PretrainArguments& arguments, const std::optional<int64_t>& threads,
                           bool reads_folder) {
  if (arguments.out.empty() && arguments.resume.empty()) {
    throw CLI::RequiredError("--out or --resume");
  }
  PretrainCommand command;
  command.device = arguments.device;
  command.folder = arguments.out.empty() ? arguments.resume : arguments.out;
  command.resume = !arguments.resume.empty() || (arguments.or_resume && reads_folder && holds_run(command.folder));
  command.overwrite = arguments.overwrite;
  if (command.resume && reads_folder) {
    command.settings = resumed_settings(arguments, command.folder, threads);
  } else {
    command.settings = arguments.settings;
    command.settings.threads = threads;
  }
  return command;
}

/// @throws CLI::Error  an option that has no effect in a dry run, or one is missing
void check_dry_run(const PretrainArguments& arguments, const Ranks& ranks) {
  const auto refuse = [](const std::string& reason) {
    throw CLI::ValidationError("--device", "meta is a dry run, which " + reason);
  };
  if (!arguments.out.empty() || !arguments.resume.empty()) {
    refuse("writes nothing: it goes without --out and --resume");
  }
  if (!arguments.settings.recipe.steps) {
    refuse("needs --steps");
  }
  if (!ranks.alone()) {
    refuse("takes one process, got " + std::to_string(ranks.count()));
  }
}

}  // namespace

void add_pretrain(CLI::App& program, const std::optional<int64_t>& threads, const Ranks& ranks,
                  std::function<void()>& work) {
  CLI::App* command = program.add_subcommand("pretrain", "Train a student and its momentum teacher without labels");
  const auto arguments = std::make_shared<PretrainArguments>(*command);
  CLI::Option* out =
      command->add_option("--out", arguments->out, "Folder of a new run: config.toml, metrics.csv and checkpoints");
  CLI::Option* resume = command->add_option(
      "--resume", arguments->resume,
      "Folder of a run to go on with, from its newest whole checkpoint, as if it had never stopped");
  CLI::Option* overwrite =
      command->add_flag("--overwrite", arguments->overwrite, "Remove the run that --out holds, if any");
  CLI::Option* or_resume = command->add_flag("--or-resume", arguments->or_resume,
                                             "Go on with the run that --out holds, if any: for commands that are "
                                             "restarted automatically after a failure");
  for (CLI::Option* option : {out, resume, overwrite, or_resume}) {
    option->configurable(false);
  }
  for (CLI::Option* option : {out, resume}) {
    option->type_name("FOLDER");
  }
  out->excludes(resume);
  overwrite->needs(out);
  or_resume->needs(out)->excludes(overwrite);
  command->footer(kSources);
  command->callback([arguments, &threads, &ranks, &work] {
    if (arguments->device == "meta") {
      check_dry_run(*arguments, ranks);
      work = [arguments] { run_dry(arguments->settings); };
      return;
    }
    const PretrainCommand chosen = command_of(*arguments, threads, ranks.first());
    work = [chosen, &ranks] { run_pretrain(chosen, ranks); };
  });
}

}  // namespace m2teacher
