#include "cli/encoder_options.h"

#include <CLI/CLI.hpp>

#include <string>

namespace m2teacher {

void add_checkpoint(CLI::App& command, std::filesystem::path& checkpoint) {
  command.add_option("--checkpoint", checkpoint, "A checkpoint, or the folder of a run: its newest whole one")
      ->type_name("PATH")
      ->required();
}

void add_network(CLI::App& command, BranchImpl::Side& side) {
  command
      .add_option_function<std::string>(
          "--network",
          [&side](const std::string& word) {
            side = word == "student" ? BranchImpl::Side::Student : BranchImpl::Side::Teacher;
          },
          "Which of the two networks (ours)")
      ->check(CLI::IsMember({"teacher", "student"}))
      ->type_name("")
      ->default_str("teacher");
}

}  // namespace m2teacher
