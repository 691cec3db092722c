#include "benchmark/time_layers.h"
#include "cli/commands.h"
#include "settings/run_flags.h"

#include <CLI/CLI.hpp>

#include <filesystem>
#include <memory>

namespace m2teacher {
namespace {

struct TimeLayersArguments {
  explicit TimeLayersArguments(CLI::App& command) : flags(command) { declare(flags, settings); }

  static void declare(Flags& flags, RunSettings& settings) {
    add_data_flags(flags, settings.data);
    add_recipe_flags(flags, settings.recipe);
  }

  RunSettings settings;
  Flags flags;
  std::filesystem::path recipe;
  TimeLayersCommand command;
};

/// The recipe's settings, with what was given in their place.
void run_arguments(TimeLayersArguments& arguments) {
  RunSettings settings;
  if (!arguments.recipe.empty()) {
    settings = read_config(arguments.recipe);
  }
  CLI::App same_options;
  Flags flags(same_options);
  TimeLayersArguments::declare(flags, settings);
  flags.set_given(arguments.flags);
  arguments.command.data = settings.data;
  arguments.command.recipe = settings.recipe;
  run_time_layers(arguments.command);
}

}  // namespace

void add_time_layers(CLI::App& program) {
  CLI::App* command = program.add_subcommand(
      "time-layers",
      "Print a table: time of a step with the published formulas, with torch's BatchNorm, with Momentum BatchNorm "
      "in the teacher, with this library's layers in both networks");
  const auto arguments = std::make_shared<TimeLayersArguments>(*command);
  command->add_option("--recipe", arguments->recipe, "Take the settings of this config.toml")->type_name("FILE");
  Flags flags(*command);
  flags.number("--rounds", arguments->command.rounds, {1}, "Rounds, of which the median counts (ours)");
  command->footer(kSources);
  command->callback([arguments] { run_arguments(*arguments); });
}

}  // namespace m2teacher
