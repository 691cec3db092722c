#include "cli/cli.h"

#include "cli/commands.h"
#include "settings/run_flags.h"
#include "settings/strict_toml.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <iostream>
#include <memory>
#include <optional>
#include <string>

namespace m2teacher {
namespace {

void print_error(std::string message) {
  message.resize(std::min(message.size(), message.find('\n')));
  std::cerr << "m2teacher: error: " << message << '\n';
}

}  // namespace

int run(int argc, const char* const* argv) {
  CLI::App program{"Trains image encoders without labels by a student and its momentum teacher (arXiv 2101.07525).",
                   "m2teacher"};
  program.fallthrough();
  program.allow_config_extras(CLI::config_extras_mode::error);
  program.config_formatter(std::make_shared<StrictToml>());
  program
      .set_config("--config", "",
                  "File with options in TOML: [pretrain] and a line NAME = VALUE for each; what the command line says "
                  "counts first")
      ->type_name("FILE");
  std::optional<int64_t> threads;
  Flags flags(program);
  add_threads_flag(flags, threads);
  program.parse_complete_callback([&threads] {
    if (threads) {
      at::set_num_threads(static_cast<int>(*threads));
    }
  });
  // Checked last, so that a misspelt command is named.
  program.callback([&program] {
    if (program.get_subcommands().empty()) {
      throw CLI::RequiredError("A subcommand");
    }
  });
  add_pretrain(program, threads);
  add_evaluations(program);
  add_checkpoint_tools(program);
  add_time_layers(program);
  try {
    program.parse(argc, argv);
    return kExitSuccess;
  } catch (const CLI::Success& help) {
    return program.exit(help);
  } catch (const CLI::ParseError& error) {
    print_error(words_of(error));
    return kExitUsage;
  } catch (const c10::Error& error) {
    print_error(error.what_without_backtrace());
  } catch (const std::exception& error) {
    print_error(error.what());
  }
  return kExitFailure;
}

}  // namespace m2teacher
