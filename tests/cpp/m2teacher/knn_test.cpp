#include "eval/knn.h"

#include "expect_user_error.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

namespace m2teacher {
namespace {

/// One query after the other, in plain loops.
double oracle(const LabelledFeatures& queries, const LabelledFeatures& bank, int64_t classes,
              const KnnOptions& options) {
  const auto value = [](const at::Tensor& t, int64_t i, int64_t j) { return t[i][j].item<double>(); };
  const auto cosine = [&](int64_t q, int64_t b) {
    double dot = 0;
    double qq = 0;
    double bb = 0;
    for (int64_t f = 0; f < bank.features.size(1); ++f) {
      const double x = value(queries.features, q, f);
      const double y = value(bank.features, b, f);
      dot += x * y;
      qq += x * x;
      bb += y * y;
    }
    return dot / std::sqrt(qq * bb);
  };
  int64_t right = 0;
  for (int64_t q = 0; q < queries.features.size(0); ++q) {
    std::vector<std::pair<double, int64_t>> found;
    for (int64_t b = 0; b < bank.features.size(0); ++b) {
      found.emplace_back(cosine(q, b), bank.labels[b].item<int64_t>());
    }
    std::sort(found.rbegin(), found.rend());
    std::vector<double> votes(static_cast<size_t>(classes));
    for (int64_t i = 0; i < options.neighbours; ++i) {
      votes[static_cast<size_t>(found[i].second)] += std::exp(found[i].first / options.temperature);
    }
    const auto winner = std::max_element(votes.begin(), votes.end()) - votes.begin();
    right += winner == queries.labels[q].item<int64_t>() ? 1 : 0;
  }
  return 100.0 * static_cast<double>(right) / static_cast<double>(queries.features.size(0));
}

LabelledFeatures random_features(int64_t count) {
  return {at::randn({count, 5}), at::randint(0, 3, {count}, at::kLong)};
}

TEST(Knn, EqualsPlainLoops) {
  at::manual_seed(11);
  const LabelledFeatures bank = random_features(60);
  const LabelledFeatures queries = random_features(300);
  for (const KnnOptions& options : {KnnOptions{1, 0.07}, KnnOptions{7, 0.07}, KnnOptions{20, 0.5}}) {
    EXPECT_NEAR(knn_accuracy(queries, bank, 3, options), oracle(queries, bank, 3, options), 1e-9);
  }
}

TEST(Knn, FindsTheImageItself) {
  at::manual_seed(2);
  const at::Tensor bank = at::randn({50, 8});
  const Neighbours nearest = nearest_neighbours(bank * 3, bank, 4);
  EXPECT_TRUE(at::equal(nearest.index.select(1, 0), at::arange(50)));
  EXPECT_TRUE(at::allclose(nearest.similarity.select(1, 0), at::ones({50})));
  EXPECT_TRUE((nearest.similarity.diff() <= 0).all().item<bool>());
}

TEST(Knn, RefusesMoreNeighboursThanThereAre) {
  expect_user_error([] { nearest_neighbours(at::randn({2, 3}), at::randn({4, 3}), 5); }, "5 is more than the 4");
}

}  // namespace
}  // namespace m2teacher
