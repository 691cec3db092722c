#include "commands/export.h"

#include "checkpoint/checkpoint.h"
#include "checkpoint/safetensors.h"

#include <nlohmann/json.hpp>

#include <iostream>

namespace m2teacher {

void run_export(const ExportCommand& command) {
  const Checkpoint checkpoint = open_checkpoint(command.checkpoint, std::cerr);
  const Encoder encoder = build_encoder(checkpoint, command.side);
  const EncoderOptions& options = checkpoint.settings.recipe.model.encoder;
  const TrainedOn& images = checkpoint.trained_on;
  Safetensors contents;
  contents.metadata = {{"format", "pt"},  // what libraries that read state dicts look for
                       {"architecture", to_string(options.architecture)},
                       {"channels", std::to_string(images.shape.channels)},
                       {"image_size", std::to_string(images.shape.height) + "x" + std::to_string(images.shape.width)},
                       {"pixel_mean", nlohmann::json(images.pixels.mean).dump()},
                       {"pixel_std", nlohmann::json(images.pixels.std).dump()}};
  if (options.stem && options.architecture != Architecture::Small) {
    contents.metadata["stem"] = to_string(*options.stem);
  }
  for (const auto& item : encoder->named_parameters()) {
    contents.tensors.emplace(item.key(), item.value().detach());
  }
  for (const auto& item : encoder->named_buffers()) {
    contents.tensors.emplace(item.key(), item.value());
  }
  write_safetensors(command.out, contents);
  std::cout << command.out.string() << '\n';
}

}  // namespace m2teacher
