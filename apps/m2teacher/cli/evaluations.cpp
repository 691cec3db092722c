#include "cli/commands.h"
#include "cli/encoder_options.h"
#include "commands/compare.h"
#include "commands/evaluate.h"
#include "commands/features.h"
#include "commands/neighbours.h"
#include "settings/run_flags.h"

#include <CLI/CLI.hpp>

#include <memory>

namespace m2teacher {
namespace {

/// --checkpoint and the images: those that the run trained on unless others are given.
void add_source(CLI::App& command, EvaluationSource& source) {
  add_checkpoint(command, source.checkpoint);
  add_device(command, source.device);
  const auto given = std::make_shared<DataOptions>();
  const auto flags = std::make_shared<Flags>(command);
  add_data_flags(*flags, *given);
  for (const Flag& flag : flags->all()) {
    if (flag.option->get_expected_min() > 0) {
      flag.option->default_str("the run's");
    }
  }
  source.data = [given, flags](DataOptions saved) {
    CLI::App same_options;
    Flags kept(same_options);
    add_data_flags(kept, saved);
    kept.set_given(*flags);
    return saved;
  };
}

void add_knn(CLI::App& program) {
  auto arguments = std::make_shared<KnnCommand>();
  CLI::App* command = program.add_subcommand("knn", "Accuracy of an encoder by weighted nearest neighbours");
  add_source(*command, arguments->source);
  add_network(*command, arguments->side);
  Flags flags(*command);
  flags.number("--neighbours", arguments->options.neighbours, {1}, "Neighbours that vote (DINO, arXiv 2104.14294)");
  flags.number("--temperature", arguments->options.temperature, {0.001, 1000},
               "A neighbour weighs exp(cosine / temperature) (arXiv 1805.01978)");
  flags.number("--shift", arguments->shift, {0, 1},
               "Shift all images by up to this share of half their side, and flip half of them; 0: as they are (ours)");
  add_seed_flag(flags, arguments->seed);
  command->callback([arguments] { run_knn(*arguments); });
}

void add_linear(CLI::App& program) {
  auto arguments = std::make_shared<LinearCommand>();
  CLI::App* command = program.add_subcommand("linear", "Accuracy of an encoder by linear probes on frozen features");
  add_source(*command, arguments->source);
  add_network(*command, arguments->side);
  Flags flags(*command);
  flags.numbers(
      "--labels-per-class", arguments->labels_per_class, {0}, 1, 32,
      "Labels that each probe sees; 0: all. A default that a class has too few images for is left out (ours)");
  const CLI::Option* labels = flags.last();
  add_seed_flag(flags, arguments->seed);
  command->callback([arguments, labels] {
    arguments->asked_for = labels->count() > 0;
    run_linear(*arguments);
  });
}

void add_features(CLI::App& program) {
  auto arguments = std::make_shared<FeaturesCommand>();
  CLI::App* command =
      program.add_subcommand("features",
                             "Write an encoder's features of all images, for NumPy: train-features.npy, "
                             "train-labels.npy, train-files.txt with the path of each row, the same of the test set, "
                             "and classes.txt with the name of each label");
  add_source(*command, arguments->source);
  add_network(*command, arguments->side);
  command->add_option("--out", arguments->out, "Folder for the files")->type_name("FOLDER")->required();
  command->callback([arguments] { run_features(*arguments); });
}

void add_compare(CLI::App& program) {
  auto arguments = std::make_shared<CompareCommand>();
  CLI::App* command = program.add_subcommand(
      "compare", "Print a table: raw pixels, untrained encoder, student and teacher by every evaluation");
  add_source(*command, arguments->source);
  Flags flags(*command);
  add_seed_flag(flags, arguments->seed);
  command->callback([arguments] { run_compare(*arguments); });
}

void add_neighbours(CLI::App& program) {
  auto arguments = std::make_shared<NeighboursCommand>();
  CLI::App* command =
      program.add_subcommand("neighbours", "Write test images and their nearest training images to a file");
  add_source(*command, arguments->source);
  add_network(*command, arguments->side);
  command->add_option("--out", arguments->out, "File to write, in safetensors format")->type_name("FILE")->required();
  Flags flags(*command);
  flags.number("--queries", arguments->queries, {1}, "Test images, drawn from all classes in turn (ours)");
  flags.number("--neighbours", arguments->neighbours, {1}, "Neighbours of each (ours)");
  add_seed_flag(flags, arguments->seed);
  command->callback([arguments] { run_neighbours(*arguments); });
}

}  // namespace

void add_evaluations(CLI::App& program) {
  add_knn(program);
  add_linear(program);
  add_features(program);
  add_compare(program);
  add_neighbours(program);
}

}  // namespace m2teacher
