#include "cli/commands.h"
#include "cli/encoder_options.h"
#include "commands/export.h"
#include "commands/info.h"

#include <CLI/CLI.hpp>

#include <memory>

namespace m2teacher {
namespace {

void add_export(CLI::App& program) {
  auto arguments = std::make_shared<ExportCommand>();
  CLI::App* command = program.add_subcommand(
      "export", "Write an encoder as a state dict with torchvision's names, in safetensors format");
  add_checkpoint(*command, arguments->checkpoint);
  add_network(*command, arguments->side);
  command->add_option("--out", arguments->out, "File to write")->type_name("FILE")->required();
  command->callback([arguments] { run_export(*arguments); });
}

void add_info(CLI::App& program) {
  auto arguments = std::make_shared<InfoCommand>();
  CLI::App* command = program.add_subcommand("info", "Print what a checkpoint holds");
  add_checkpoint(*command, arguments->checkpoint);
  command->add_flag("--tensors", arguments->tensors, "List every tensor with its dtype and shape");
  command->callback([arguments] { run_info(*arguments); });
}

}  // namespace

void add_checkpoint_tools(CLI::App& program) {
  add_export(program);
  add_info(program);
}

}  // namespace m2teacher
