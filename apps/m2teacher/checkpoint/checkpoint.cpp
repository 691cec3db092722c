#include "checkpoint/checkpoint.h"

#include "checkpoint/run_folder.h"
#include "checkpoint/safetensors.h"
#include "dtype_and_shape.h"
#include "error.h"
#include "text/printable.h"

#include <ATen/ops/scalar_tensor.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <utility>

namespace m2teacher {
namespace {

using nlohmann::json;

// What the metadata say of the file: what wrote it, and the version of its layout.
constexpr const char* kFormat = "m2teacher";
constexpr const char* kVersion = "2";

constexpr const char* kRows = "metrics.rows";
constexpr const char* kLossCount = "metrics.loss_count";
constexpr const char* kLossSum = "metrics.loss_sum";
constexpr const char* kStep = "step";

std::string to_json(const TrainedOn& trained_on) {
  return json{{"images", trained_on.images},          {"channels", trained_on.shape.channels},
              {"height", trained_on.shape.height},    {"width", trained_on.shape.width},
              {"pixel_mean", trained_on.pixels.mean}, {"pixel_std", trained_on.pixels.std}}
      .dump();
}

/// Checks what a file says of the images: a stranger's decides what memory is taken.
class TrainedOnParser {
 public:
  TrainedOnParser(std::string file, const std::string& text) : file_(std::move(file)) {
    constexpr size_t kMostCharacters = 1024;  // it takes a few hundred
    found_ = text.size() <= kMostCharacters ? json::parse(text, nullptr, /*allow_exceptions=*/false) : json();
  }

  TrainedOn parse() const {
    constexpr int64_t kMostImages = int64_t{1} << 40;
    constexpr int64_t kLargestSide = int64_t{1} << 32;     // an IDX file holds no more bytes
    constexpr double kSmallestDeviation = 1.0 / (1 << 8);  // that `pixel_statistics` gives
    const int64_t images = count("images", kMostImages);
    if (at("channels") != 1 && at("channels") != 3) {
      refuse("channels", "1 or 3");
    }
    const auto channels = at("channels").get<int64_t>();
    return {
        .images = images,
        .shape = {.channels = channels, .height = count("height", kLargestSide), .width = count("width", kLargestSide)},
        .pixels = {.mean = per_channel("pixel_mean", channels, 0),
                   .std = per_channel("pixel_std", channels, kSmallestDeviation)}};
  }

 private:
  const json& at(const char* key) const {
    if (!found_.is_object() || !found_.contains(key)) {
      throw UserError(file_ + ": its metadata do not say what images it was trained on");
    }
    return found_[key];
  }

  [[noreturn]] void refuse(const char* key, const std::string& expected) const {
    throw UserError(file_ + ": trained_on: " + key + ": got " + at(key).dump() + ", expected " + expected);
  }

  int64_t count(const char* key, int64_t most) const {
    const json& value = at(key);
    // A number that int64 cannot hold becomes a negative one here.
    const int64_t number = value.is_number_integer() ? value.get<int64_t>() : 0;
    if (number < 1 || number > most) {
      refuse(key, "1 to " + std::to_string(most));
    }
    return number;
  }

  /// Of pixels in [0, 1].
  std::vector<double> per_channel(const char* key, int64_t channels, double least) const {
    const json& values = at(key);
    const auto fits = [least](const json& value) {
      return value.is_number() && value.get<double>() >= least && value.get<double>() <= 1;
    };
    if (!values.is_array() || values.size() != static_cast<size_t>(channels) ||
        !std::all_of(values.begin(), values.end(), fits)) {
      refuse(key,
             "a number from " + json(least).dump() + " to 1 for each of " + std::to_string(channels) + " channels");
    }
    return values.get<std::vector<double>>();
  }

  std::string file_;
  json found_;
};

/// A number of our own among the tensors of the run. @throws UserError  it is missing, or no single one of the type
template <typename Number>
Number number_in(const std::string& file, const std::map<std::string, at::Tensor>& tensors, const char* name) {
  const auto found = tensors.find(name);
  if (found == tensors.end() || found->second.numel() != 1 ||
      found->second.scalar_type() != c10::CppTypeToScalarType<Number>::value) {
    throw UserError(file + ": a checkpoint that lacks '" + name + "'");
  }
  return found->second.item<Number>();
}

/// The same, out of the tensors.
template <typename Number>
Number take(const std::string& file, std::map<std::string, at::Tensor>& tensors, const char* name) {
  const auto value = number_in<Number>(file, tensors, name);
  tensors.erase(name);
  return value;
}

/// @throws UserError  how far the run is cannot be
void check_counts(const Checkpoint& checkpoint) {
  const std::string file = checkpoint.path.string();
  const auto step = number_in<int64_t>(file, checkpoint.state, kStep);
  const auto check = [&](const char* name, int64_t count, int64_t most) {
    if (count < 0 || count > most) {
      throw UserError(file + ": damaged or no checkpoint of m2teacher: '" + name + "' is " + std::to_string(count) +
                      ", expected 0 to " + std::to_string(most));
    }
  };
  check(kStep, step, checkpoint.settings.recipe.steps.value_or(0));
  check(kRows, checkpoint.metrics.rows, step);
  check(kLossCount, checkpoint.metrics.loss_count, step);
}

/// @throws UserError  a value is NaN or infinite
void check_finite(const Checkpoint& checkpoint, const std::string& name, const at::Tensor& tensor) {
  if (tensor.is_floating_point() && !tensor.isfinite().all().item<bool>()) {
    throw UserError(checkpoint.path.string() + ": '" + name + "' holds values that are not finite (NaN or infinity)");
  }
}

void fill(const Checkpoint& checkpoint, const std::string& name, const at::Tensor& into) {
  const auto found = checkpoint.state.find(name);
  if (found == checkpoint.state.end()) {
    throw UserError(checkpoint.path.string() + ": a checkpoint of another model: it lacks '" + name + "'");
  }
  const at::Tensor& tensor = found->second;
  if (tensor.sizes() != into.sizes() || tensor.scalar_type() != into.scalar_type()) {
    throw UserError(checkpoint.path.string() + ": a checkpoint of another model: '" + name + "' is " +
                    dtype_and_shape(tensor) + ", expected " + dtype_and_shape(into));
  }
  check_finite(checkpoint, name, tensor);
  into.copy_(tensor);
}

}  // namespace

std::string describe(const TrainedOn& images) {
  return std::to_string(images.images) + " images of " + std::to_string(images.shape.channels) + " x " +
         std::to_string(images.shape.height) + " x " + std::to_string(images.shape.width);
}

int64_t Checkpoint::step() const { return state.at(kStep).item<int64_t>(); }

void save_checkpoint(const std::filesystem::path& path, const Checkpoint& checkpoint) {
  Safetensors contents;
  contents.metadata = {{"format", kFormat},
                       {"version", kVersion},
                       {"config", to_toml(checkpoint.settings)},
                       {"trained_on", to_json(checkpoint.trained_on)}};
  contents.tensors = checkpoint.state;
  contents.tensors[kRows] = at::scalar_tensor(checkpoint.metrics.rows, at::kLong);
  contents.tensors[kLossCount] = at::scalar_tensor(checkpoint.metrics.loss_count, at::kLong);
  contents.tensors[kLossSum] = at::scalar_tensor(checkpoint.metrics.loss_sum, at::kDouble);
  write_checked_safetensors(path, contents);
}

Checkpoint read_checkpoint(const std::filesystem::path& path) {
  const std::string file = path.string();
  Safetensors contents = read_checked_safetensors(path);
  const auto value = [&](const char* key) { return contents.metadata[key]; };
  if (value("format") != kFormat) {
    throw UserError(file + ": a safetensors file, but no checkpoint of m2teacher");
  }
  if (value("version") != kVersion) {
    throw UserError(file + ": a checkpoint of version '" + value("version") + "', expected '" + kVersion + "'");
  }
  Checkpoint checkpoint;
  checkpoint.path = path;
  checkpoint.settings = parse_toml(value("config"), file);
  checkpoint.trained_on = TrainedOnParser(file, value("trained_on")).parse();
  try {
    checkpoint.settings.recipe =
        resolve(checkpoint.settings.recipe, checkpoint.trained_on.images, checkpoint.trained_on.shape);
  } catch (const UserError& error) {
    throw UserError(file + ": " + error.what());
  }
  checkpoint.metrics.rows = take<int64_t>(file, contents.tensors, kRows);
  checkpoint.metrics.loss_count = take<int64_t>(file, contents.tensors, kLossCount);
  checkpoint.metrics.loss_sum = take<double>(file, contents.tensors, kLossSum);
  checkpoint.state = std::move(contents.tensors);
  check_counts(checkpoint);
  return checkpoint;
}

std::optional<Checkpoint> newest_checkpoint(const std::filesystem::path& folder, std::ostream& notes) {
  for (const CheckpointFile& file : list_checkpoints(folder)) {
    try {
      return read_checkpoint(file.path);
    } catch (const ReadError&) {
      throw;
    } catch (const UserError& error) {
      notes << "skipped: " << printable(error.what()) << '\n';
    }
  }
  return std::nullopt;
}

Checkpoint open_checkpoint(const std::filesystem::path& path, std::ostream& notes) {
  if (!std::filesystem::is_directory(path)) {
    return read_checkpoint(path);
  }
  std::optional<Checkpoint> newest = newest_checkpoint(path, notes);
  if (!newest) {
    throw UserError(path.string() + ": holds no whole checkpoint of a run");
  }
  return *std::move(newest);
}

namespace {

/// Layers that the settings ask for take no more memory than the file shows: a wrong width must not take it all.
/// @throws UserError
void check_widths(const Checkpoint& checkpoint, const EncoderOptions& options) {
  int64_t values = 0;
  for (const auto& [name, tensor] : checkpoint.state) {
    values += tensor.numel();
  }
  if (options.architecture != Architecture::Small) {
    return;
  }
  int64_t before = 1;
  for (const int64_t width : options.widths) {
    if (before * width > values) {
      throw UserError(checkpoint.path.string() + ": a checkpoint of another model: its settings ask for a layer of " +
                      std::to_string(before) + " x " + std::to_string(width) + " channels, its tensors hold " +
                      std::to_string(values) + " values");
    }
    before = width;
  }
}

}  // namespace

Encoder build_encoder(const Checkpoint& checkpoint, BranchImpl::Side side) {
  const std::string prefix = side == BranchImpl::Side::Student ? "student.encoder." : "teacher.encoder.";
  check_widths(checkpoint, checkpoint.settings.recipe.model.encoder);
  Encoder encoder(checkpoint.settings.recipe.model.encoder, batch_norm());
  torch::NoGradGuard no_grad;
  for (const auto& item : encoder->named_parameters()) {
    fill(checkpoint, prefix + item.key(), item.value());
  }
  for (const auto& item : encoder->named_buffers()) {
    fill(checkpoint, prefix + item.key(), item.value());
  }
  encoder->eval();
  return encoder;
}

}  // namespace m2teacher
