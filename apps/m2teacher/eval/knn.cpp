#include "eval/knn.h"

#include "error.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>

namespace m2teacher {
namespace {

// Bounds the matrix of similarities to the bank.
constexpr int64_t kQueryChunk = 256;
constexpr double kSmallestNorm = 1e-12;

at::Tensor unit_rows(const at::Tensor& features) {
  return features / features.norm(2, {1}, /*keepdim=*/true).clamp_min_(kSmallestNorm);
}

}  // namespace

Neighbours nearest_neighbours(const at::Tensor& queries, const at::Tensor& bank, int64_t count) {
  if (bank.size(0) < count) {
    throw UserError("--neighbours: " + std::to_string(count) + " is more than the " + std::to_string(bank.size(0)) +
                    " images to look among");
  }
  const at::Tensor transposed_bank = unit_rows(bank).t();
  std::vector<at::Tensor> similarity;
  std::vector<at::Tensor> index;
  for (const at::Tensor& chunk : unit_rows(queries).split(kQueryChunk)) {
    auto [values, indices] = chunk.matmul(transposed_bank).topk(count, /*dim=*/1);
    similarity.push_back(std::move(values));
    index.push_back(std::move(indices));
  }
  return {at::cat(similarity), at::cat(index)};
}

double knn_accuracy(const LabelledFeatures& queries, const LabelledFeatures& bank, int64_t classes,
                    const KnnOptions& options) {
  const Neighbours nearest = nearest_neighbours(queries.features, bank.features, options.neighbours);
  const at::Tensor weights = nearest.similarity.div(options.temperature).exp_();
  const at::Device device = nearest.index.device();
  const at::Tensor neighbour_labels =
      bank.labels.to(device).index_select(0, nearest.index.flatten()).view_as(nearest.index);
  const at::Tensor votes =
      at::zeros({weights.size(0), classes}, weights.options()).scatter_add_(1, neighbour_labels, weights);
  return 100 * votes.argmax(1).eq(queries.labels.to(device)).to(at::kDouble).mean().item<double>();
}

}  // namespace m2teacher
