#include "cli.h"

#include "benchmark/time_layers.h"
#include "commands/evaluate.h"
#include "commands/pretrain.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <CLI/CLI.hpp>

#include <iostream>
#include <limits>
#include <memory>
#include <sstream>
#include <string>

namespace m2teacher {
namespace {

constexpr int64_t kWidestLayer = 1 << 16;
constexpr int64_t kMaxPool = 64;

/// Refuses what is no number or outside [low, high], in words without trailing zeros.
template <typename Number>
CLI::Validator between(Number low, Number high) {
  std::ostringstream range;
  range << low;
  if (high == std::numeric_limits<Number>::max()) {
    range << " or more";
  } else {
    range << " to " << high;
  }
  return {[low, high, range = range.str()](std::string& text) {
            Number value{};
            if (CLI::detail::lexical_cast(text, value) && value >= low && value <= high) {
              return std::string();
            }
            return "got " + text + ", expected " + range;
          },
          range.str()};
}

CLI::Validator at_least(int64_t low) { return between(low, std::numeric_limits<int64_t>::max()); }

CLI::Validator share() { return between(0.0, 1.0); }

void add_data(CLI::App& app, DataOptions& data) {
  app.add_option_function<std::string>(
         "--data", [&data](const std::string& text) { data.spec = parse_data_spec(text); },
         "Images: idx:FOLDER with the four IDX files of the MNIST family, .gz or not")
      ->default_str(to_string(data.spec));
}

void add_seed(CLI::App& app, uint64_t& seed) {
  app.add_option("--seed", seed, "Seed of all random numbers")
      ->check(between(int64_t{0}, int64_t{std::numeric_limits<uint32_t>::max()}))
      ->capture_default_str();
}

void add_source(CLI::App& app, EncoderSource& source) {
  add_data(app, source.data);
  app.add_option("--checkpoint", source.checkpoint, "What pretrain has written")->required();
  app.add_option_function<std::string>(
         "--network",
         [&source](const std::string& side) {
           source.side = side == "student" ? BranchImpl::Side::Student : BranchImpl::Side::Teacher;
         },
         "Which of the two networks")
      ->check(CLI::IsMember({"teacher", "student"}))
      ->default_str("teacher");
}

void add_recipe(CLI::App& app, PretrainOptions& recipe) {
  app.add_option("--steps", recipe.steps, "Training steps")->check(at_least(1))->capture_default_str();
  app.add_option("--batch-size", recipe.batch_size, "Images per step, each seen in two views")
      ->check(at_least(2))
      ->capture_default_str();
  app.add_option("--learning-rate", recipe.learning_rate, "Peak of the cosine")
      ->check(between(0.0, 1000.0))
      ->capture_default_str();
  app.add_option("--warmup-steps", recipe.warmup_steps, "Steps over which the learning rate rises")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--sgd-momentum", recipe.sgd_momentum, "Momentum of SGD")->check(share())->capture_default_str();
  app.add_option("--weight-decay", recipe.weight_decay, "For all weights but biases and BatchNorm's")
      ->check(share())
      ->capture_default_str();
  app.add_option("--param-momentum", recipe.param_momentum,
                 "Weight of the teacher's own parameters in the first update; rises to 1 by a cosine")
      ->check(share())
      ->capture_default_str();
  app.add_option("--widths", recipe.model.encoder.widths, "Channels of the encoder's stages, as in 32,64,128")
      ->delimiter(',')
      ->check(between(int64_t{1}, kWidestLayer))
      ->expected(1, 8)
      ->capture_default_str();
  app.add_option("--pool", recipe.model.encoder.pool,
                 "Fields per side of the grid that the encoder's output is averaged to")
      ->check(between(int64_t{1}, kMaxPool))
      ->capture_default_str();
  app.add_option_function<int64_t>(
         "--head-hidden",
         [&recipe](int64_t units) { recipe.model.projector_hidden = recipe.model.predictor_hidden = units; },
         "Hidden units of projector and predictor")
      ->check(between(int64_t{1}, kWidestLayer))
      ->default_str(std::to_string(recipe.model.projector_hidden));
  app.add_option("--head-out", recipe.model.projector_out, "Outputs of projector and predictor")
      ->check(between(int64_t{1}, kWidestLayer))
      ->capture_default_str();
  add_seed(app, recipe.seed);
}

void add_pretrain(CLI::App& app) {
  auto command = std::make_shared<PretrainCommand>();
  CLI::App* sub = app.add_subcommand("pretrain", "Train a student and its momentum teacher without labels");
  add_data(*sub, command->data);
  sub->add_option("--out", command->out, "Folder for checkpoint.safetensors and metrics.csv")->required();
  add_recipe(*sub, command->recipe);
  sub->add_option("--eval-every", command->eval_every,
                  "Steps between two looks at the teacher's kNN accuracy on a few images; 0: none")
      ->check(at_least(0))
      ->capture_default_str();
  sub->callback([command] { run_pretrain(*command); });
}

void add_knn(CLI::App& app) {
  auto command = std::make_shared<KnnCommand>();
  CLI::App* sub = app.add_subcommand("knn", "Accuracy of an encoder by weighted nearest neighbours");
  add_source(*sub, command->source);
  sub->add_option("--neighbours", command->options.neighbours, "Neighbours that vote")
      ->check(at_least(1))
      ->capture_default_str();
  sub->add_option("--temperature", command->options.temperature, "A neighbour weighs exp(cosine / temperature)")
      ->check(between(0.001, 1000.0))
      ->capture_default_str();
  sub->add_option("--shift", command->shift,
                  "Shift all images by up to this share of half their side, and flip half of them; 0: as they are")
      ->check(share())
      ->capture_default_str();
  add_seed(*sub, command->seed);
  sub->callback([command] { run_knn(*command); });
}

void add_linear(CLI::App& app) {
  auto command = std::make_shared<LinearCommand>();
  CLI::App* sub = app.add_subcommand("linear", "Accuracy of an encoder by linear probes");
  add_source(*sub, command->source);
  sub->add_option("--labels-per-class", command->labels_per_class, "Labels that a probe sees, as in 0,100,10; 0: all")
      ->delimiter(',')
      ->check(at_least(0))
      ->capture_default_str();
  add_seed(*sub, command->seed);
  sub->callback([command] { run_linear(*command); });
}

void add_compare(CLI::App& app) {
  auto command = std::make_shared<CompareCommand>();
  CLI::App* sub =
      app.add_subcommand("compare", "Table: raw pixels, untrained encoder, student and teacher by every evaluation");
  add_data(*sub, command->data);
  sub->add_option("--checkpoint", command->checkpoint, "What pretrain has written")->required();
  add_seed(*sub, command->seed);
  sub->callback([command] { run_compare(*command); });
}

void add_neighbours(CLI::App& app) {
  auto command = std::make_shared<NeighboursCommand>();
  CLI::App* sub = app.add_subcommand("neighbours", "Write test images and their nearest training images to a file");
  add_source(*sub, command->source);
  sub->add_option("--out", command->out, "File to write, in safetensors format")->required();
  sub->add_option("--queries", command->queries, "Test images")->check(at_least(1))->capture_default_str();
  sub->add_option("--neighbours", command->neighbours, "Neighbours of each")->check(at_least(1))->capture_default_str();
  sub->callback([command] { run_neighbours(*command); });
}

void add_time_layers(CLI::App& app) {
  auto command = std::make_shared<TimeLayersCommand>();
  CLI::App* sub = app.add_subcommand(
      "time-layers", "Table: time of a teacher with the published formulas, with BatchNorm, with Momentum BatchNorm");
  add_data(*sub, command->data);
  sub->add_option("--rounds", command->rounds, "Rounds, of which the median counts")
      ->check(at_least(1))
      ->capture_default_str();
  add_recipe(*sub, command->recipe);
  sub->callback([command] { run_time_layers(*command); });
}

void print_error(std::string message) {
  message.resize(std::min(message.size(), message.find('\n')));
  std::cerr << "m2teacher: error: " << message << '\n';
}

}  // namespace

int run(int argc, const char* const* argv) {
  CLI::App app{"Trains image encoders without labels by a student and its momentum teacher (arXiv 2101.07525).",
               "m2teacher"};
  app.fallthrough();
  // Checked last, so that a misspelt command is named.
  app.callback([&app] {
    if (app.get_subcommands().empty()) {
      throw CLI::RequiredError("A subcommand");
    }
  });
  int threads = at::get_num_threads();
  app.add_option_function<int>(
         "--threads", [](int count) { at::set_num_threads(count); }, "CPU threads")
      ->check(between(1, 1024))
      ->default_str(std::to_string(threads));
  add_pretrain(app);
  add_knn(app);
  add_linear(app);
  add_compare(app);
  add_neighbours(app);
  add_time_layers(app);
  try {
    app.parse(argc, argv);
    return kExitSuccess;
  } catch (const CLI::Success& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    print_error(error.what());
    return kExitUsage;
  } catch (const c10::Error& error) {
    print_error(error.what_without_backtrace());
  } catch (const std::exception& error) {
    print_error(error.what());
  }
  return kExitFailure;
}

}  // namespace m2teacher
