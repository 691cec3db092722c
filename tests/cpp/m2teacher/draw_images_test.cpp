#include "eval/draw_images.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace m2teacher {
namespace {

/// Images in order of their classes, as folders give them: so many of each, and at the end some without a label.
TensorSource sorted_source(const std::vector<int64_t>& sizes, int64_t unlabelled = 0) {
  std::vector<at::Tensor> labels;
  for (size_t label = 0; label < sizes.size(); ++label) {
    labels.push_back(at::full({sizes[label]}, static_cast<int64_t>(label), at::kLong));
  }
  labels.push_back(at::full({unlabelled}, -1, at::kLong));
  const at::Tensor all = at::cat(labels);
  return {at::zeros({all.size(0), 1, 1, 1}, at::kByte), all};
}

at::Tensor draw(const TensorSource& source, int64_t count, Spread spread, uint64_t seed) {
  return draw_images(source, labelled_images(source), count, spread, seed);
}

int64_t distinct(const at::Tensor& index) { return std::get<0>(at::_unique(index)).size(0); }

TEST(DrawImages, ClassesKeepTheirShare) {
  const TensorSource source = sorted_source({600, 300, 100, 1}, 50);
  for (const uint64_t seed : {0, 1, 2}) {
    const at::Tensor drawn = draw(source, 100, Spread::Proportional, seed);
    ASSERT_EQ(drawn.size(0), 100);
    EXPECT_EQ(distinct(drawn), 100);
    EXPECT_TRUE((drawn.diff() > 0).all().item<bool>());
    const at::Tensor counts = source.labels().index_select(0, drawn).bincount({}, 4);
    EXPECT_LE((counts - at::tensor({60, 30, 10, 0})).abs().max().item<int64_t>(), 1) << counts;
  }
}

TEST(DrawImages, ManyClassesAreNotTheFirstOnes) {
  const TensorSource source = sorted_source(std::vector<int64_t>(1000, 3));
  const at::Tensor labels = source.labels().index_select(0, draw(source, 500, Spread::Proportional, 0));
  EXPECT_EQ(distinct(labels), 500);
  EXPECT_NEAR(labels.to(at::kDouble).mean().item<double>(), 499.5, 60);
}

TEST(DrawImages, BalancedTakesClassesInTurn) {
  const TensorSource source = sorted_source({50, 2, 9}, 5);
  const at::Tensor drawn = draw(source, 8, Spread::Balanced, 0);
  EXPECT_TRUE(at::equal(source.labels().index_select(0, drawn), at::tensor({0, 1, 2, 0, 1, 2, 0, 2}, at::kLong)));
  EXPECT_EQ(distinct(drawn), 8);
}

TEST(DrawImages, DependsOnTheSeedAlone) {
  const TensorSource source = sorted_source({40, 40});
  for (const Spread spread : {Spread::Proportional, Spread::Balanced}) {
    EXPECT_TRUE(at::equal(draw(source, 10, spread, 3), draw(source, 10, spread, 3)));
    EXPECT_FALSE(at::equal(draw(source, 10, spread, 3), draw(source, 10, spread, 4)));
  }
}

TEST(DrawImages, AllWhereThereAreFewer) {
  const TensorSource source = sorted_source({3, 2});
  EXPECT_TRUE(at::equal(draw(source, 99, Spread::Proportional, 1), at::arange(5)));
  EXPECT_EQ(distinct(draw(source, 99, Spread::Balanced, 1)), 5);
}

TEST(DrawImages, WithoutLabelsAllAreOneClass) {
  const TensorSource source(at::zeros({100, 1, 1, 1}, at::kByte), at::Tensor());
  const at::Tensor drawn = draw(source, 20, Spread::Proportional, 1);
  EXPECT_EQ(distinct(drawn), 20);
  EXPECT_GT(drawn.max().item<int64_t>(), 60);
}

}  // namespace
}  // namespace m2teacher
