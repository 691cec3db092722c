#include "commands/neighbours.h"

#include "checkpoint/safetensors.h"
#include "error.h"
#include "eval/draw_images.h"
#include "eval/images_at.h"
#include "eval/knn.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/searchsorted.h>
#include <nlohmann/json.hpp>

#include <memory>
#include <string>
#include <vector>

namespace m2teacher {
namespace {

/// Rows of `nearest`, of which each may hold the row that `own` names, without that, one column less.
at::Tensor without_themselves(const at::Tensor& nearest, const at::Tensor& own) {
  const int64_t columns = nearest.size(1) - 1;
  at::Tensor out = at::empty({nearest.size(0), columns}, at::kLong);
  const auto from = nearest.accessor<int64_t, 2>();
  auto into = out.accessor<int64_t, 2>();
  for (int64_t row = 0; row < nearest.size(0); ++row) {
    const auto itself = own[row].item<int64_t>();
    for (int64_t column = 0, kept = 0; kept < columns; ++column) {
      if (from[row][column] != itself) {
        into[row][kept++] = from[row][column];
      }
    }
  }
  return out;
}

/// Each of `first`, (N, ...), before its share of `others`, (N * k, ...): (N, 1 + k, ...).
at::Tensor side_by_side(const at::Tensor& first, const at::Tensor& others) {
  const int64_t rows = first.size(0);
  std::vector<int64_t> shape = {rows, others.size(0) / rows};
  const auto rest = others.sizes().slice(1);
  shape.insert(shape.end(), rest.begin(), rest.end());
  return at::cat({first.unsqueeze(1), others.view(shape)}, 1);
}

/// A list in JSON, which is UTF-8 where the names need not be.
std::string json_of(const std::vector<std::string>& names) {
  return nlohmann::json(names).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace

void run_neighbours(const NeighboursCommand& command) {
  const Evaluation evaluation = open_evaluation(command.source);
  const bool own = !evaluation.dataset.test;  // the images are looked for among themselves
  const std::shared_ptr<const ImageSource>& train = evaluation.dataset.train;
  const std::shared_ptr<const ImageSource>& tried = own ? train : evaluation.dataset.test;
  const int64_t most = labelled_images(*tried).size(0);
  if (command.queries > most) {
    throw UserError("--queries: " + std::to_string(command.queries) + " is more than the " + std::to_string(most) +
                    (own ? " training" : " test") + " images");
  }
  const int64_t found_of_each = command.neighbours + (own ? 1 : 0);
  if (found_of_each > train->size()) {
    throw UserError("--neighbours: " + std::to_string(command.neighbours) + " is more than the " +
                    std::to_string(train->size() - (own ? 1 : 0)) + " images to look among");
  }
  Encoder encoder = evaluation.encoder(command.side);
  const at::Tensor drawn =
      draw_images(*tried, labelled_images(*tried), command.queries, Spread::Balanced, command.seed);
  const LabelledFeatures queries =
      encode(encoder, tried, drawn, evaluation.checkpoint.trained_on.pixels, evaluation.data.loader);
  const LabelledFeatures bank = evaluation.features(encoder, train);
  at::Tensor nearest = nearest_neighbours(queries.features, bank.features, found_of_each).index.cpu();
  if (own) {
    // Both index the same images; the bank's are in order.
    nearest = without_themselves(nearest, at::searchsorted(bank.index, queries.index));
  }
  const at::Tensor found = nearest.flatten();
  Safetensors contents;
  contents.metadata = {{"class_names", json_of(evaluation.dataset.class_names)}};
  contents.tensors.emplace(
      "images", side_by_side(images_at(*tried, queries.index), images_at(*train, bank.index.index_select(0, found))));
  if (queries.labels.defined() && bank.labels.defined()) {
    contents.tensors.emplace("labels", side_by_side(queries.labels, bank.labels.index_select(0, found)));
  }
  write_safetensors(command.out, contents);
}

}  // namespace m2teacher
