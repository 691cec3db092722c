#include "cli/cli.h"

#include "expect_user_error.h"
#include "temporary_folder.h"

#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace m2teacher {
namespace {

struct Outcome {
  int code;
  std::string out;
  std::string error;
};

/// Runs the program in this process.
Outcome call(const std::vector<std::string>& arguments) {
  std::vector<const char*> argv = {"m2teacher"};
  for (const std::string& argument : arguments) {
    argv.push_back(argument.c_str());
  }
  testing::internal::CaptureStdout();
  testing::internal::CaptureStderr();
  const int code = run(static_cast<int>(argv.size()), argv.data());
  return {code, testing::internal::GetCapturedStdout(), testing::internal::GetCapturedStderr()};
}

/// The call must end with the exit code of a wrong command line and one line that holds `part`.
void expect_usage_error(const std::vector<std::string>& arguments, const std::string& part) {
  const Outcome outcome = call(arguments);
  EXPECT_EQ(outcome.code, kExitUsage) << outcome.error;
  EXPECT_EQ(outcome.out, "");
  EXPECT_TRUE(outcome.error.starts_with("m2teacher: error: ")) << outcome.error;
  EXPECT_EQ(std::count(outcome.error.begin(), outcome.error.end(), '\n'), 1) << outcome.error;
  EXPECT_PRED2(contains, outcome.error, part);
}

/// A wrong value, and what the error says of it.
struct Wrong {
  std::string value;
  std::string says;
};

using Options = std::map<std::string, std::vector<Wrong>>;

Options operator+(Options left, const Options& right) {
  left.insert(right.begin(), right.end());
  return left;
}

std::vector<Wrong> outside(const std::string& range, const std::vector<std::string>& values) {
  std::vector<Wrong> wrong;
  for (const std::string& value : values) {
    wrong.push_back({value, "got " + value + ", expected " + range});
  }
  return wrong;
}

std::vector<Wrong> unknown_word(const std::string& words) {
  return {{"other", "got 'other', expected one of " + words}};
}

// What may be the name of a file is refused only when it cannot be read or written.
const std::vector<Wrong> kAnything;
const std::vector<Wrong> kNoFlag = {{"=perhaps", "perhaps"}};
const std::vector<Wrong> kNotShare = outside("0 to 1", {"-0.1", "1.1", "nan", "inf", "half", "0.5x", ""});
const std::vector<Wrong> kNotCount =
    outside("1 or more", {"0", "-1", "1.5", "1e3", "99999999999999999999", "many", "3 4", ""});
const std::vector<Wrong> kNotNatural = outside("0 or more", {"-1", "1.5", "x"});
const std::vector<Wrong> kNotWidth = outside("1 to 65536", {"0", "65537", "1.5", "x"});

const Options kData = {
    {"--data",
     {{"idx", "got 'idx', expected idx:FOLDER, cifar10:FOLDER or folder:FOLDER"},
      {"idx:", "got 'idx:', expected"},
      {"tar:x", "got 'tar', expected one of idx, cifar10, folder"}}},
    {"--image-size", outside("8 to 4096", {"7", "4097", "big"})},
    {"--centre-crop", outside("0.01 to 1", {"0", "1.1", "nan"})},
    {"--strict", kNoFlag},
    {"--max-pixels", kNotCount},
    {"--loader-threads", outside("0 to 1024", {"-1", "1025", "2.5"})},
    {"--batches-ahead", outside("1 to 1024", {"0", "1025"})},
    {"--loader-timeout", outside("1 to 1e+06", {"0", "-1", "inf"})},
};
const Options kSeed = {{"--seed", outside("0 to 4294967295", {"-1", "4294967296", "x"})}};
const Options kRecipe =
    Options{
        {"--architecture", unknown_word("small, resnet18, resnet50")},
        {"--stem", unknown_word("standard, small")},
        {"--widths",
         {{"8,0", "got 0, expected 1 to 65536"}, {"8,x", "got x, expected"}, {"1,2,3,4,5,6,7,8,9", "--widths"}}},
        {"--pool", outside("1 to 64", {"0", "65"})},
        {"--projector-hidden", kNotWidth},
        {"--predictor-hidden", kNotWidth},
        {"--projector-out", kNotWidth},
        {"--min-area", outside("0.001 to 1", {"0", "1.1"})},
        {"--max-area", outside("0.001 to 1", {"0", "1.1"})},
        {"--max-aspect", outside("1 to 10", {"0.9", "11"})},
        {"--flip", kNotShare},
        {"--jitter", kNotShare},
        {"--brightness", kNotShare},
        {"--contrast", kNotShare},
        {"--saturation", kNotShare},
        {"--hue", outside("0 to 0.5", {"-0.1", "0.6"})},
        {"--gamma", outside("0 to 5", {"-1", "6"})},
        {"--greyscale", kNotShare},
        {"--min-blur-sigma", outside("0.01 to 100", {"0", "101"})},
        {"--max-blur-sigma", outside("0.01 to 100", {"0", "101"})},
        {"--blur", {{"1,2", "got 2, expected 0 to 1"}, {"1", "--blur"}, {"1,1,1", "--blur"}}},
        {"--solarise", {{"-1,0", "got -1, expected 0 to 1"}, {"1", "--solarise"}}},
        {"--batch-size", outside("2 or more", {"1", "-8", "many"})},
        {"--accumulate", outside("1 to 65536", {"0", "-1", "65537"})},
        {"--epochs", outside("1e-06 to 1e+06", {"0", "inf"})},
        {"--steps", kNotCount},
        {"--warmup-epochs", outside("0 to 1e+06", {"-1", "x"})},
        {"--warmup-steps", kNotNatural},
        {"--base-learning-rate", outside("0 to 1000", {"-1", "nan", "1001"})},
        {"--learning-rate", outside("0 to 1000", {"-1", "nan", "1001", "1e400"})},
        {"--optimizer", unknown_word("sgd, lars")},
        {"--lars-trust-coefficient", outside("1e-09 to 1", {"0", "1.1"})},
        {"--sgd-momentum", kNotShare},
        {"--weight-decay", kNotShare},
        {"--param-momentum", kNotShare},
        {"--bn", unknown_word("momentum, batch, eman")},
        {"--student-bn", unknown_word("fused, torch")},
        {"--synchronise-statistics", kNoFlag},
        {"--precision", unknown_word("fp32, bf16")},
    } +
    kSeed;
const Options kRun = {{"--eval-every", kNotNatural},
                      {"--checkpoint-every", kNotCount},
                      {"--keep", kNotCount},
                      {"--process-timeout", outside("1 to 1e+06", {"0", "-1", "inf"})}};
const Options kNetwork = {{"--network", {{"pupil", "pupil"}}}};
const Options kCheckpoint = {{"--checkpoint", kAnything}};
const Options kOut = {{"--out", kAnything}};
const Options kDevice = {{"--device",
                          {{"gpu", "got 'gpu', expected one of auto, cpu, cuda, cuda:N, meta"},
                           {"cuda:", "got 'cuda:', expected one of"},
                           {"cuda:-1", "got 'cuda:-1', expected one of"},
                           {"cuda:1x", "got 'cuda:1x', expected one of"}}}};
const Options kProgram = {{"--threads", outside("1 to 1024", {"0", "1025", "two"})},
                          {"--config", {{"/nowhere.toml", "/nowhere.toml"}}},
                          {"--version", kAnything}};

const std::map<std::string, Options> kCommands = {
    {"pretrain", kData + kRecipe + kRun + kOut + kDevice +
                     Options{{"--resume", kAnything}, {"--overwrite", kNoFlag}, {"--or-resume", kNoFlag}}},
    {"knn", kCheckpoint + kDevice + kData + kNetwork + kSeed +
                Options{{"--neighbours", kNotCount},
                        {"--temperature", outside("0.001 to 1000", {"0", "nan"})},
                        {"--shift", kNotShare}}},
    {"linear",
     kCheckpoint + kDevice + kData + kNetwork + kSeed +
         Options{{"--labels-per-class", {{"-1", "got -1, expected 0 or more"}, {"1,x", "got x, expected 0 or more"}}}}},
    {"features", kCheckpoint + kDevice + kData + kNetwork + kOut},
    {"compare", kCheckpoint + kDevice + kData + kSeed},
    {"neighbours", kCheckpoint + kDevice + kData + kNetwork + kOut + kSeed +
                       Options{{"--queries", kNotCount}, {"--neighbours", kNotCount}}},
    {"export", kCheckpoint + kNetwork + kOut},
    {"info", kCheckpoint + Options{{"--tensors", kNoFlag}}},
    {"time-layers", kData + kRecipe + Options{{"--recipe", kAnything}, {"--rounds", kNotCount}}},
};

/// Options with what --help says of each, in one line.
std::map<std::string, std::string> described(const std::vector<std::string>& arguments) {
  std::istringstream text(std::regex_replace(call(arguments).out, std::regex("\n {20,}"), " "));
  const std::regex option("^ +(?:-h,)?(--[a-z-]+)(.*)$");
  std::map<std::string, std::string> found;
  std::string line;
  while (std::getline(text, line)) {
    std::smatch match;
    if (std::regex_match(line, match, option) && match[1] != "--help") {
      found[match[1]] = match[2];
    }
  }
  return found;
}

template <typename Value>
std::set<std::string> names(const std::map<std::string, Value>& items) {
  std::set<std::string> out;
  for (const auto& [name, value] : items) {
    out.insert(name);
  }
  return out;
}

class Command : public testing::TestWithParam<std::string> {};

TEST_P(Command, RefusesEveryOptionWhenWrong) {
  const Options& options = kCommands.at(GetParam());
  EXPECT_EQ(names(described({GetParam(), "--help"})), names(options));
  for (const auto& [option, values] : options) {
    for (const Wrong& wrong : values) {
      std::vector<std::string> arguments = {GetParam()};
      if (wrong.value.starts_with('=')) {
        arguments.push_back(option + wrong.value);
      } else {
        arguments.insert(arguments.end(), {option, wrong.value});
      }
      SCOPED_TRACE(option + " " + wrong.value);
      expect_usage_error(arguments, wrong.says);
      expect_usage_error(arguments, option.substr(2));
    }
  }
  std::vector<std::string> arguments = {GetParam(), "--wrong"};
  for (const char* required : {"--checkpoint", "--out"}) {
    if (options.contains(required)) {
      arguments.insert(arguments.end(), {required, "x"});
    }
  }
  expect_usage_error(arguments, "--wrong");
  if (options.contains("--checkpoint")) {
    expect_usage_error({GetParam()}, "--checkpoint is required");
  }
}

INSTANTIATE_TEST_SUITE_P(Cli, Command, testing::ValuesIn([] {
                           const std::set<std::string> all = names(kCommands);
                           return std::vector<std::string>(all.begin(), all.end());
                         }()),
                         [](const auto& info) { return std::regex_replace(info.param, std::regex("-"), ""); });

TEST(Cli, ListsAllCommandsAndRefusesOthers) {
  const std::string help = call({"--help"}).out;
  std::set<std::string> listed;
  const std::regex command("\n  ([a-z][a-z-]*) ");
  for (std::sregex_iterator match(help.begin(), help.end(), command), end; match != end; ++match) {
    listed.insert((*match)[1]);
  }
  EXPECT_EQ(listed, names(kCommands));
  EXPECT_EQ(names(described({"--help"})), names(kProgram));
  for (const auto& [option, values] : kProgram) {
    for (const Wrong& wrong : values) {
      expect_usage_error({"pretrain", option, wrong.value}, wrong.says);
    }
  }
  expect_usage_error({}, "subcommand");
  expect_usage_error({"fly"}, "fly");
  expect_usage_error({"pretrain", "--fast", "yes"}, "--fast");
}

TEST(Cli, SaysItsVersion) {
  const Outcome outcome = call({"--version"});
  EXPECT_EQ(outcome.code, kExitSuccess);
  EXPECT_TRUE(std::regex_match(outcome.out, std::regex("m2teacher [0-9]+\\.[0-9]+\\.[0-9]+\n"))) << outcome.out;
}

TEST(Cli, HelpSaysWhereDefaultsComeFrom) {
  const auto options = described({"pretrain", "--help"});
  const std::regex source(R"(\([^()]*\b(paper|published code|BYOL|ours)\b[^()]*\))");
  for (const std::string& option : names(kData + kRecipe + kRun)) {
    EXPECT_TRUE(std::regex_search(options.at(option), source)) << option << options.at(option);
  }
  const std::string help = call({"pretrain", "--help"}).out;
  for (const char* place : {"arXiv 2101.07525", "github.com/zengarden/momentum2-teacher", "arXiv 2006.07733"}) {
    EXPECT_PRED2(contains, help, place);
  }
  // The published recipe: exps/arxiv and data/transforms.py there.
  const std::map<std::string, std::string> published = {
      {"--architecture", "resnet50"},
      {"--projector-hidden", "4096"},
      {"--predictor-hidden", "4096"},
      {"--projector-out", "256"},
      {"--batch-size", "256"},
      {"--epochs", "100"},
      {"--warmup-epochs", "10"},
      {"--base-learning-rate", "0.05"},
      {"--weight-decay", "1e-04"},
      {"--sgd-momentum", "0.9"},
      {"--param-momentum", "0.99"},
      {"--blur", "1,0.1"},
      {"--solarise", "0,0.2"},
      {"--min-area", "0.08"},
      {"--jitter", "0.8"},
      {"--brightness", "0.4"},
      {"--contrast", "0.4"},
      {"--saturation", "0.2"},
      {"--hue", "0.1"},
      {"--greyscale", "0.2"},
      {"--max-aspect", "1.3333333333333333"},
      {"--bn", "momentum"},
      {"--min-blur-sigma", "0.1"},
      {"--max-blur-sigma", "2"},
  };
  for (const auto& [option, value] : published) {
    EXPECT_PRED2(contains, options.at(option), "=" + value + " ");
  }
}

TEST(Cli, OptionsOfPretrainThatExcludeOrNeedEachOther) {
  expect_usage_error({"pretrain"}, "--out or --resume is required");
  expect_usage_error({"pretrain", "--out", "x", "--resume", "y"}, "--out excludes --resume");
  expect_usage_error({"pretrain", "--resume", "y", "--overwrite"}, "--overwrite requires --out");
  expect_usage_error({"pretrain", "--steps", "3", "--steps", "4", "--out", "x"}, "--steps");
  expect_usage_error({"pretrain", "--device", "meta", "--steps", "3", "--out", "x"},
                     "--device: meta is a dry run, which writes nothing: it goes without --out and --resume");
  expect_usage_error({"pretrain", "--device", "meta"}, "--device: meta is a dry run, which needs --steps");
}

TEST(Cli, RefusesAWrongConfig) {
  const TemporaryFolder folder;
  const std::string config = folder / "a.toml";
  const std::string out = folder / "run";
  std::string sections;  // CLI11 alone would take gigabytes for so many
  for (int i = 0; i < 20'000; ++i) {
    sections += ".a";
  }
  const std::map<std::string, std::string> wrong = {
      {"[pretrain]\nstepps = 3\n", "no such option: pretrain.stepps"},
      {"[pretrain]\nsteps = 0\n", "--steps: got 0, expected 1 or more"},
      {"[pretrain]\nsteps = 3\nkeep = 1\nsteps = 4\n", "'pretrain.steps' is set twice"},
      {"[fly]\nsteps = 3\n", "fly.steps"},
      {"[pretrain]\nout = \"x\"\n", "out"},
      {"[pretrain]\nconfig = \"x\"\n", "config"},
      {"[a" + sections + "]\nsteps = 3\n", "a name of more than 16 sections"},
      {"a" + sections + " = 3\n", "a name of more than 16 sections"},
      {"[=" + sections + "]\nsteps = 3\n", "a name of more than 16 sections"},
      {"[=" + sections.substr(0, 40) + "]\nsteps = 3\n", "a name of more than 16 sections"},
      {"[" + std::string(300, 'a') + "]\nsteps = 3\n", "a name of more than 256 characters"},
      {"[pretrain]\nsteps = [50", config + ": line 2: the list of 'steps' has no closing ]"},
      {"[pretrain]\n" + std::string(300'000, '#'), "longer than 262144 characters"},
  };
  for (const auto& [text, says] : wrong) {
    write_bytes(config, text);
    expect_usage_error({"pretrain", "--config", config, "--out", out}, says);
  }
  EXPECT_FALSE(std::filesystem::exists(out));
}

}  // namespace
}  // namespace m2teacher
