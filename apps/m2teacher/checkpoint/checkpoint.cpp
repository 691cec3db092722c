#include "checkpoint/checkpoint.h"

#include "checkpoint/safetensors.h"
#include "error.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <sstream>

namespace m2teacher {
namespace {

using nlohmann::json;

// What the metadata say of the file: what wrote it, and the version of its layout.
constexpr const char* kFormat = "m2teacher";
constexpr const char* kVersion = "1";
constexpr int64_t kMaxWidth = 1 << 16;
constexpr size_t kMaxStages = 8;  // as the command line allows

void add_module(Safetensors& contents, const std::string& prefix, const torch::nn::Module& module) {
  for (const auto& item : module.named_parameters()) {
    contents.tensors.emplace(prefix + item.key(), item.value().detach());
  }
  for (const auto& item : module.named_buffers()) {
    contents.tensors.emplace(prefix + item.key(), item.value());
  }
}

json settings(const Pretrainer& pretrainer) {
  const PretrainOptions& options = pretrainer.options();
  return {{"architecture", to_string(options.model.encoder.architecture)},
          {"in_channels", options.model.encoder.in_channels},
          {"widths", options.model.encoder.widths},
          {"pool", options.model.encoder.pool},
          {"projector_hidden", options.model.projector_hidden},
          {"predictor_hidden", options.model.predictor_hidden},
          {"projector_out", options.model.projector_out},
          {"steps", *options.steps},
          {"steps_done", pretrainer.steps_done()},
          {"batch_size", options.batch_size},
          {"learning_rate", *options.learning_rate},
          {"warmup_steps", *options.warmup_steps},
          {"sgd_momentum", options.sgd_momentum},
          {"weight_decay", options.weight_decay},
          {"param_momentum", options.param_momentum},
          {"seed", options.seed}};
}

EncoderOptions encoder_options(const std::string& file, const Safetensors& contents) {
  const auto value = [&](const char* key) -> std::string {
    const auto found = contents.metadata.find(key);
    return found == contents.metadata.end() ? "" : found->second;
  };
  if (value("format") != kFormat) {
    throw UserError(file + ": a safetensors file, but no checkpoint of m2teacher");
  }
  if (value("version") != kVersion) {
    throw UserError(file + ": a checkpoint of version '" + value("version") + "', expected '" + kVersion + "'");
  }
  const json found = json::parse(value("settings"), nullptr, /*allow_exceptions=*/false);
  const auto is_size = [](const json& size) {
    return size.is_number_unsigned() && size.get<uint64_t>() >= 1 && size.get<uint64_t>() <= kMaxWidth;
  };
  const bool complete =
      found.is_object() && found.contains("in_channels") && is_size(found["in_channels"]) && found.contains("pool") &&
      is_size(found["pool"]) && found.contains("widths") && found["widths"].is_array() && !found["widths"].empty() &&
      found["widths"].size() <= kMaxStages && std::all_of(found["widths"].begin(), found["widths"].end(), is_size);
  if (!complete) {
    throw UserError(file + ": its metadata do not say how the encoder is built");
  }
  return {.architecture = Architecture::Small,
          .in_channels = found["in_channels"].get<int64_t>(),
          .stem = std::nullopt,
          .widths = found["widths"].get<std::vector<int64_t>>(),
          .pool = found["pool"].get<int64_t>()};
}

std::string shape_text(at::IntArrayRef sizes) {
  std::ostringstream text;
  text << sizes;
  return text.str();
}

void fill(const std::string& file, const Safetensors& contents, const std::string& name, const at::Tensor& into) {
  const auto found = contents.tensors.find(name);
  if (found == contents.tensors.end()) {
    throw UserError(file + ": a checkpoint of another model: it lacks '" + name + "'");
  }
  const at::Tensor& tensor = found->second;
  if (tensor.sizes() != into.sizes() || tensor.scalar_type() != into.scalar_type()) {
    throw UserError(file + ": a checkpoint of another model: '" + name + "' is " + at::toString(tensor.scalar_type()) +
                    " of shape " + shape_text(tensor.sizes()) + ", expected " + at::toString(into.scalar_type()) +
                    " of shape " + shape_text(into.sizes()));
  }
  into.copy_(tensor);
}

}  // namespace

void save_checkpoint(const std::filesystem::path& path, Pretrainer& pretrainer) {
  Safetensors contents;
  contents.metadata = {{"format", kFormat}, {"version", kVersion}, {"settings", settings(pretrainer).dump()}};
  add_module(contents, "student.", *pretrainer.student());
  add_module(contents, "teacher.", *pretrainer.teacher().model());
  write_safetensors(path, contents);
}

CheckpointInfo read_checkpoint_info(const std::filesystem::path& path) {
  return {.encoder = encoder_options(path.string(), read_safetensors(path))};
}

Encoder load_encoder(const std::filesystem::path& path, BranchImpl::Side side) {
  const Safetensors contents = read_safetensors(path);
  const std::string prefix = side == BranchImpl::Side::Student ? "student.encoder." : "teacher.encoder.";
  Encoder encoder(encoder_options(path.string(), contents), batch_norm());
  torch::NoGradGuard no_grad;
  for (const auto& item : encoder->named_parameters()) {
    fill(path.string(), contents, prefix + item.key(), item.value());
  }
  for (const auto& item : encoder->named_buffers()) {
    fill(path.string(), contents, prefix + item.key(), item.value());
  }
  encoder->eval();
  return encoder;
}

}  // namespace m2teacher
