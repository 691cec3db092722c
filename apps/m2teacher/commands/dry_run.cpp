#include "commands/dry_run.h"

#include "data/load_dataset.h"
#include "device/choose_device.h"
#include "training/pretrainer.h"

#include <iostream>

namespace m2teacher {
namespace {

int64_t values_of(const torch::nn::Module& module) {
  int64_t values = 0;
  for (const at::Tensor& parameter : module.parameters()) {
    values += parameter.numel();
  }
  return values;
}

}  // namespace

void run_dry(const RunSettings& settings) {
  const at::Device device = choose_device("meta");
  const Dataset dataset = load_dataset(settings.data);
  const TrainingData data = {.source = dataset.train, .pixels = dataset.pixels, .loader = settings.data.loader};
  Pretrainer pretrainer(settings.recipe, data, nullptr, {}, device);
  while (pretrainer.steps_done() < pretrainer.total_steps()) {
    pretrainer.step();
  }
  std::cout << "dry run: " << pretrainer.total_steps() << " steps of " << pretrainer.options().images_per_step()
            << " images passed; the student has " << values_of(*pretrainer.student())
            << " parameters; nothing was computed or written\n";
}

}  // namespace m2teacher
