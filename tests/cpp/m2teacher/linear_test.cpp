#include "eval/linear.h"

#include "expect_user_error.h"

#include <ATen/ATen.h>

namespace m2teacher {
namespace {

/// Classes as shifted clouds, on scales that standardisation must even out.
LabelledFeatures clouds(int64_t count, double distance) {
  const at::Tensor labels = at::arange(count) % 3;
  at::Tensor features = at::randn({count, 6});
  features.scatter_add_(1, labels.unsqueeze(1), at::full({count, 1}, distance));
  return {features * at::tensor({1e3, 1.0, 1e-2, 1.0, 1.0, 1.0}, at::kFloat) + 5, labels};
}

/// Logistic regression by Newton's method in float64, on standardised features.
double oracle(const LabelledFeatures& train, const LabelledFeatures& test, int64_t classes, double penalty) {
  const at::Tensor mean = train.features.to(at::kDouble).mean(0);
  const at::Tensor std = train.features.to(at::kDouble).std(0, /*unbiased=*/false);
  const auto design = [&](const at::Tensor& features) {
    return at::cat({(features.to(at::kDouble) - mean) / std, at::ones({features.size(0), 1}, at::kDouble)}, 1);
  };
  const at::Tensor x = design(train.features);
  const int64_t columns = x.size(1);
  const auto count = static_cast<double>(x.size(0));
  const at::Tensor target = at::one_hot(train.labels, classes).to(at::kDouble);
  at::Tensor weight_penalty = at::full({columns}, penalty, at::kDouble);
  weight_penalty[columns - 1] = 0;
  at::Tensor w = at::zeros({classes, columns}, at::kDouble);
  for (int iteration = 0; iteration < 30; ++iteration) {
    const at::Tensor p = x.matmul(w.t()).softmax(1);
    const at::Tensor gradient = (p - target).t().matmul(x) / count + w * weight_penalty;
    at::Tensor hessian = at::zeros({classes, columns, classes, columns}, at::kDouble);
    for (int64_t a = 0; a < classes; ++a) {
      for (int64_t b = 0; b < classes; ++b) {
        const at::Tensor s = p.select(1, a) * ((a == b ? 1.0 : 0.0) - p.select(1, b));
        hessian.select(0, a).select(1, b).copy_(x.t().matmul(x * s.unsqueeze(1)) / count);
      }
      hessian.select(0, a).select(1, a).add_(at::diag(weight_penalty));
    }
    // The tiny ridge settles the biases, of which only differences matter.
    const at::Tensor matrix = hessian.reshape({classes * columns, -1}) + 1e-9 * at::eye(classes * columns, at::kDouble);
    w = w - at::linalg_solve(matrix, gradient.flatten()).view_as(w);
  }
  const at::Tensor predicted = design(test.features).matmul(w.t()).argmax(1);
  return 100 * predicted.eq(test.labels).to(at::kDouble).mean().item<double>();
}

TEST(LinearProbe, FewLabelsReachTheOptimum) {
  at::manual_seed(4);
  const LabelledFeatures train = clouds(60, 1.5);
  const LabelledFeatures test = clouds(600, 1.5);
  // All 20 labels of each class: every draw is the whole set.
  const FewLabelsOptions options{.labels_per_class = 20, .draws = 2};
  EXPECT_NEAR(few_labels_accuracy(train, test, 3, options), oracle(train, test, 3, options.weight_penalty), 0.2);
}

TEST(LinearProbe, AllLabelsComeCloseToTheOptimum) {
  at::manual_seed(5);
  const LabelledFeatures train = clouds(900, 1.5);
  const LabelledFeatures test = clouds(900, 1.5);
  EXPECT_NEAR(linear_accuracy(train, test, 3, {.batch_size = 300}), oracle(train, test, 3, 0), 1.0);
}

TEST(LinearProbe, SameSeedSameFigure) {
  at::manual_seed(6);
  const LabelledFeatures train = clouds(300, 1.0);
  const LabelledFeatures test = clouds(300, 1.0);
  EXPECT_EQ(linear_accuracy(train, test, 3, {.batch_size = 64, .seed = 1}),
            linear_accuracy(train, test, 3, {.batch_size = 64, .seed = 1}));
  EXPECT_EQ(few_labels_accuracy(train, test, 3, {.seed = 1}), few_labels_accuracy(train, test, 3, {.seed = 1}));
}

TEST(DrawPerClass, TakesEachClassAlikeWithoutRepeats) {
  const at::Tensor labels = at::arange(100) % 4;
  const at::Tensor index = draw_per_class(labels, 4, 7, 1);
  EXPECT_TRUE(at::equal(labels.index_select(0, index).bincount(), at::full({4}, 7, at::kLong)));
  EXPECT_EQ(std::get<0>(at::_unique(index)).size(0), 28);
  EXPECT_FALSE(at::equal(index, draw_per_class(labels, 4, 7, 2)));
  expect_user_error([&] { draw_per_class(labels, 4, 26, 1); }, "class 0 has 25 training images, 26 were asked for");
}

TEST(DrawPerClass, PassesOverClassesWithoutAnyImage) {
  const at::Tensor labels = at::arange(100) % 4 + 1;  // as EMNIST's letters, whose labels begin with 1
  EXPECT_TRUE(at::equal(labels.index_select(0, draw_per_class(labels, 5, 7, 1)).bincount(),
                        at::tensor({0, 7, 7, 7, 7}, at::kLong)));
}

TEST(TooFewLabels, NamesTheClass) {
  const at::Tensor labels = at::tensor({0, 0, 0, 2, 2, -1}, at::kLong);
  const std::vector<std::string> names = {"ant", "bee", "cat"};
  EXPECT_EQ(too_few_labels(labels, names, 0), "");
  EXPECT_EQ(too_few_labels(labels, names, 2), "");
  EXPECT_EQ(too_few_labels(labels, names, 3), "class cat has 2 training images, 3 were asked for");
}

}  // namespace
}  // namespace m2teacher
