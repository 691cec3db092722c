#include "cli/cli.h"

#include "cli/commands.h"
#include "distributed/together.h"
#include "output/file_descriptor.h"
#include "output/standard_streams.h"
#include "settings/run_flags.h"
#include "settings/strict_toml.h"
#include "text/printable.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <exception>
#include <filesystem>
#include <functional>
#include <iostream>
#include <memory>
#include <optional>
#include <string>

namespace m2teacher {
namespace {

struct Failure {
  int code;
  std::string words;
};

Failure failure_of(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const CLI::ParseError& parse_error) {
    return {kExitUsage, words_of(parse_error)};
  } catch (const c10::Error& torch_error) {
    return {kExitFailure, torch_error.what_without_backtrace()};
  } catch (const std::filesystem::filesystem_error& files) {
    return {kExitFailure, files.path1().string() + ": " + files.code().message()};
  } catch (const std::exception& other) {
    return {kExitFailure, other.what()};
  }
}

/// Says in one line what went wrong. @return the exit code
int tell(Failure failure, const Ranks& ranks) {
  failure.words.resize(std::min(failure.words.size(), failure.words.find('\n')));
  std::cerr << "m2teacher: error: " << (ranks.first() ? "" : "rank " + std::to_string(ranks.rank()) + ": ")
            << printable(failure.words) << '\n';
  return failure.code;
}

/// @param work  filled with what is to be done then
/// @return the exit code, where the command line asks for help alone
std::optional<int> parse(int argc, const char* const* argv, const Ranks& ranks, std::function<void()>& work) {
  CLI::App program{"Trains image encoders without labels by a student and its momentum teacher (arXiv 2101.07525).",
                   "m2teacher"};
  program.set_version_flag("--version", "m2teacher " M2TEACHER_VERSION, "Print the version");
  program.fallthrough();
  program.allow_config_extras(CLI::config_extras_mode::error);
  program.config_formatter(std::make_shared<StrictToml>());
  program
      .set_config(
          "--config", "",
          "File with options in TOML: [pretrain] and a line NAME = VALUE for each; the command line overrides it")
      ->type_name("FILE");
  std::optional<int64_t> threads;
  Flags flags(program);
  add_threads_flag(flags, threads);
  program.parse_complete_callback([&program, &threads, &ranks] {
    if (threads) {
      at::set_num_threads(static_cast<int>(*threads));
    }
    const std::vector<CLI::App*> commands = program.get_subcommands();
    if (!ranks.alone() && !commands.empty() && commands.front()->get_name() != "pretrain") {
      throw CLI::ValidationError(commands.front()->get_name(),
                                 "works on one process, got " + std::to_string(ranks.count()));
    }
  });
  // Checked last, so that a misspelt command is named.
  program.callback([&program] {
    if (program.get_subcommands().empty()) {
      throw CLI::RequiredError("A subcommand");
    }
  });
  add_pretrain(program, threads, ranks, work);
  add_evaluations(program);
  add_checkpoint_tools(program);
  add_time_layers(program);
  try {
    program.parse(argc, argv);
    return std::nullopt;
  } catch (const CLI::ConfigError& error) {
    throw CLI::ConfigError(program.get_config_ptr()->as<std::string>() + ": " + words_of(error),
                           CLI::ExitCodes::ConfigError);
  } catch (const CLI::Success& help) {
    return ranks.first() ? program.exit(help) : kExitSuccess;
  }
}

}  // namespace

namespace {

int run_command(int argc, const char* const* argv, const std::string& process_group) {
  Ranks ranks;
  try {
    ranks = Ranks(process_group);
    std::optional<int> code;
    std::function<void()> work;
    together(ranks, [&] { code = parse(argc, argv, ranks, work); });
    if (work) {
      work();
    }
    return code.value_or(kExitSuccess);
  } catch (const ToldElsewhere& elsewhere) {
    return elsewhere.own() ? failure_of(elsewhere.own()).code : kExitFailure;
  } catch (const std::exception&) {
    return tell(failure_of(std::current_exception()), ranks);
  }
}

}  // namespace

int run(int argc, const char* const* argv, const std::string& process_group) {
  let_writes_fail();
  open_standard_streams();
  const int code = run_command(argc, argv, process_group);
  return standard_streams_arrived() || code != kExitSuccess ? code : kExitFailure;
}

}  // namespace m2teacher
