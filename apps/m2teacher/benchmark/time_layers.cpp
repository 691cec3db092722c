#include "benchmark/time_layers.h"

#include "benchmark/machine.h"
#include "benchmark/published_norm.h"
#include "data/augment.h"
#include "data/load_dataset.h"
#include "output/table.h"

#include <algorithm>
#include <chrono>
#include <iostream>
#include <vector>

namespace m2teacher {
namespace {

constexpr int64_t kWarmupRounds = 3;
constexpr int64_t kCallsPerRound = 4;

struct Contender {
  Contender(std::string of_teacher, std::string of_student, const PretrainOptions& recipe, const TrainingData& data,
            const NormFactory& teacher_norm)
      : teacher(std::move(of_teacher)), student(std::move(of_student)), pretrainer(recipe, data, teacher_norm) {}

  std::string teacher;
  std::string student;
  Pretrainer pretrainer;
  std::vector<double> forward_ms;
  std::vector<double> step_ms;
};

template <typename Call>
double mean_milliseconds(const Call& call) {
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < kCallsPerRound; ++i) {
    call();
  }
  const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
  return took.count() / kCallsPerRound;
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

void measure_round(Contender& contender, const at::Tensor& view, bool keep) {
  // The network by itself: the teacher would count forwards that no step is for, and warn that they do not fit.
  Branch network = contender.pretrainer.teacher().model();
  const double forward_ms = mean_milliseconds([&] {
    const torch::NoGradGuard no_grad;
    network->forward(view);
    network->forward(view);
  });
  const double step_ms = mean_milliseconds([&] { contender.pretrainer.step(); });
  if (keep) {
    contender.forward_ms.push_back(forward_ms);
    contender.step_ms.push_back(step_ms);
  }
}

}  // namespace

void run_time_layers(const TimeLayersCommand& command) {
  const Dataset dataset = load_dataset(command.data);
  const TrainingData data{.source = dataset.train, .pixels = dataset.pixels, .loader = command.data.loader};
  const at::Tensor images = images_in_memory(*dataset.train);
  const at::Tensor view = standardise_(
      to_unit_range(images.narrow(0, 0, std::min(command.recipe.batch_size, images.size(0)))), dataset.pixels);
  std::vector<std::unique_ptr<Contender>> contenders;
  const auto add = [&](const std::string& teacher, const NormFactory& teacher_norm, StudentNorm student) {
    PretrainOptions recipe = command.recipe;
    recipe.student_bn = student;
    const std::string student_name = student == StudentNorm::Torch ? "BatchNorm, torch's" : "BatchNorm, ours";
    contenders.push_back(std::make_unique<Contender>(teacher, student_name, recipe, data, teacher_norm));
  };
  add("published formulas, eager", published_norm(), StudentNorm::Torch);
  add("BatchNorm, torch's", batch_norm(), StudentNorm::Torch);
  add("Momentum BatchNorm, ours", momentum_batch_norm(), StudentNorm::Torch);
  add("Momentum BatchNorm, ours", momentum_batch_norm(), StudentNorm::Fused);

  for (int64_t round = -kWarmupRounds; round < command.rounds; ++round) {
    for (const auto& contender : contenders) {
      measure_round(*contender, view, /*keep=*/round >= 0);
    }
  }

  std::vector<std::vector<std::string>> rows = {
      {"normalisation in the teacher", "in the student", "teacher forward, ms", "step, ms"}};
  for (const auto& contender : contenders) {
    rows.push_back({contender->teacher, contender->student, format_number(median(contender->forward_ms), 2),
                    format_number(median(contender->step_ms), 2)});
  }
  std::cout << format_table(rows) << "Both views of a batch of " << command.recipe.batch_size << "; median of "
            << command.rounds << " rounds in turns, one process. " << describe_machine() << ".\n";
}

}  // namespace m2teacher
