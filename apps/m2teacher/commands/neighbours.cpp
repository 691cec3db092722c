#include "commands/neighbours.h"

#include "checkpoint/safetensors.h"
#include "error.h"
#include "eval/knn.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <nlohmann/json.hpp>

#include <string>

namespace m2teacher {
namespace {

/// Rows of `nearest`, of which the i-th may hold i, without that, one column less.
at::Tensor without_themselves(const at::Tensor& nearest) {
  const int64_t columns = nearest.size(1) - 1;
  at::Tensor out = at::empty({nearest.size(0), columns}, at::kLong);
  const auto from = nearest.accessor<int64_t, 2>();
  auto into = out.accessor<int64_t, 2>();
  for (int64_t row = 0; row < nearest.size(0); ++row) {
    for (int64_t column = 0, kept = 0; kept < columns; ++column) {
      if (from[row][column] != row) {
        into[row][kept++] = from[row][column];
      }
    }
  }
  return out;
}

at::Tensor images_at(const ImageSource& source, const at::Tensor& index) {
  return images_in_memory(source).index_select(0, index);
}

}  // namespace

void run_neighbours(const NeighboursCommand& command) {
  const Evaluation evaluation = open_evaluation(command.source);
  const ImageSource& bank = *evaluation.dataset.train;
  const bool own = !evaluation.dataset.test;  // the images are looked for among themselves
  const ImageSource& tried = own ? bank : *evaluation.dataset.test;
  if (command.queries > tried.size()) {
    throw UserError("--queries: " + std::to_string(command.queries) + " is more than the " +
                    std::to_string(tried.size()) + (own ? " training" : " test") + " images");
  }
  Encoder encoder = build_encoder(evaluation.checkpoint, command.side);
  const at::Tensor queries =
      encode(encoder, tried, command.queries, evaluation.checkpoint.trained_on.pixels, evaluation.data.loader);
  at::Tensor nearest =
      nearest_neighbours(queries, evaluation.features(encoder, bank), command.neighbours + (own ? 1 : 0)).index;
  if (own) {
    nearest = without_themselves(nearest);
  }
  /// Query and neighbours side by side: (queries, 1 + neighbours, ...).
  const auto beside = [&](const at::Tensor& query, const at::Tensor& found) {
    std::vector<int64_t> shape = {command.queries, command.neighbours};
    const auto rest = found.sizes().slice(1);
    shape.insert(shape.end(), rest.begin(), rest.end());
    return at::cat({query.unsqueeze(1), found.view(shape)}, 1);
  };
  const at::Tensor first = at::arange(command.queries, at::kLong);
  const at::Tensor found = nearest.flatten();
  Safetensors contents;
  contents.metadata = {{"class_names", nlohmann::json(evaluation.dataset.class_names).dump()}};
  contents.tensors.emplace("images", beside(images_at(tried, first), images_at(bank, found)));
  if (tried.labels().defined() && bank.labels().defined()) {
    contents.tensors.emplace("labels",
                             beside(tried.labels().index_select(0, first), bank.labels().index_select(0, found)));
  }
  write_safetensors(command.out, contents);
}

}  // namespace m2teacher
