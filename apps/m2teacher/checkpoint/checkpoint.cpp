#include "checkpoint/checkpoint.h"

#include "checkpoint/run_folder.h"
#include "checkpoint/safetensors.h"
#include "dtype_and_shape.h"
#include "error.h"
#include "text/printable.h"

#include <ATen/ops/scalar_tensor.h>
#include <nlohmann/json.hpp>

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

TrainedOn parse_trained_on(const std::string& file, const std::string& text) {
  try {
    const json found = json::parse(text);
    return {.images = found.at("images").get<int64_t>(),
            .shape = {.channels = found.at("channels").get<int64_t>(),
                      .height = found.at("height").get<int64_t>(),
                      .width = found.at("width").get<int64_t>()},
            .pixels = {.mean = found.at("pixel_mean").get<std::vector<double>>(),
                       .std = found.at("pixel_std").get<std::vector<double>>()}};
  } catch (const json::exception&) {
    throw UserError(file + ": its metadata do not say what images it was trained on");
  }
}

/// Takes a number of our own out of the tensors of the run.
template <typename Number>
Number take(const std::string& file, std::map<std::string, at::Tensor>& tensors, const char* name) {
  const auto found = tensors.find(name);
  if (found == tensors.end() || found->second.numel() != 1 ||
      found->second.scalar_type() != c10::CppTypeToScalarType<Number>::value) {
    throw UserError(file + ": a checkpoint that lacks '" + name + "'");
  }
  const Number value = found->second.item<Number>();
  tensors.erase(found);
  return value;
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
  checkpoint.trained_on = parse_trained_on(file, value("trained_on"));
  checkpoint.settings.recipe =
      resolve(checkpoint.settings.recipe, checkpoint.trained_on.images, checkpoint.trained_on.shape);
  checkpoint.metrics.rows = take<int64_t>(file, contents.tensors, kRows);
  checkpoint.metrics.loss_count = take<int64_t>(file, contents.tensors, kLossCount);
  checkpoint.metrics.loss_sum = take<double>(file, contents.tensors, kLossSum);
  checkpoint.state = std::move(contents.tensors);
  if (!checkpoint.state.contains(kStep) || checkpoint.state.at(kStep).numel() != 1) {
    throw UserError(file + ": a checkpoint that lacks '" + kStep + "'");
  }
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
