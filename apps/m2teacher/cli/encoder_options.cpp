#include "cli/encoder_options.h"

#include "device/choose_device.h"
#include "settings/flags.h"

#include <CLI/CLI.hpp>

#include <string>

namespace m2teacher {

void add_checkpoint(CLI::App& command, std::filesystem::path& checkpoint) {
  command
      .add_option("--checkpoint", checkpoint, "A checkpoint, or a run's folder, whose newest whole checkpoint is taken")
      ->type_name("PATH")
      ->required();
}

void add_device(CLI::App& command, std::string& device, const std::string& meta) {
  Flags(command).word(
      "--device", std::string("auto|cpu|cuda|cuda:N") + (meta.empty() ? "" : "|meta"), device, checked_device_word,
      +[](const std::string& word) { return word; },
      "Where the networks compute. auto: on a GPU where torch has one; of several processes each takes that of its "
      "local rank" +
          (meta.empty() ? "" : "; meta: " + meta) + " (ours)");
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
