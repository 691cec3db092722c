#include "data/augment.h"

#include "training/options.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>

#include <cmath>

namespace m2teacher {
namespace {

/// Pixel (y, x) of an image, 0 outside.
double pixel(const at::Tensor& image, int64_t y, int64_t x) {
  const bool inside = y >= 0 && y < image.size(0) && x >= 0 && x < image.size(1);
  return inside ? image[y][x].item<double>() : 0;
}

double bilinear(const at::Tensor& image, double y, double x) {
  const auto y0 = static_cast<int64_t>(std::floor(y));
  const auto x0 = static_cast<int64_t>(std::floor(x));
  const double fy = y - static_cast<double>(y0);
  const double fx = x - static_cast<double>(x0);
  return (1 - fy) * ((1 - fx) * pixel(image, y0, x0) + fx * pixel(image, y0, x0 + 1)) +
         fy * ((1 - fx) * pixel(image, y0 + 1, x0) + fx * pixel(image, y0 + 1, x0 + 1));
}

/// One image, pixel by pixel: where the centre of each output pixel falls in the image, then gamma, contrast,
/// brightness.
at::Tensor oracle(const at::Tensor& image, const at::Tensor& affine, double gamma, double contrast, double brightness) {
  const int64_t height = image.size(0);
  const int64_t width = image.size(1);
  at::Tensor out = at::empty({height, width}, at::kDouble);
  double mean = 0;
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      const double v = (2.0 * static_cast<double>(i) + 1) / static_cast<double>(height) - 1;
      const double u = (2.0 * static_cast<double>(j) + 1) / static_cast<double>(width) - 1;
      const auto a = [&](int64_t row, int64_t column) { return affine[row][column].item<double>(); };
      const double from_u = a(0, 0) * u + a(0, 1) * v + a(0, 2);
      const double from_v = a(1, 0) * u + a(1, 1) * v + a(1, 2);
      const double y = ((from_v + 1) * static_cast<double>(height) - 1) / 2;
      const double x = ((from_u + 1) * static_cast<double>(width) - 1) / 2;
      const double value = std::pow(bilinear(image, y, x), gamma);
      out[i][j] = value;
      mean += value / static_cast<double>(height * width);
    }
  }
  return ((out - mean) * contrast + mean) * brightness;
}

TEST(Augment, EqualsPixelByPixelOracle) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(3);
  const at::Tensor images = at::rand({6, 1, 9, 7}, generator, at::kFloat);
  const AugmentDraw draw = draw_augmentations(6, fashion_mnist_recipe().augment, generator);
  const at::Tensor result = apply_augmentations(images, draw);
  ASSERT_EQ(result.sizes(), images.sizes());
  for (int64_t n = 0; n < 6; ++n) {
    const at::Tensor expected = oracle(images[n][0], draw.affine[n], draw.gamma[n].item<double>(),
                                       draw.contrast[n].item<double>(), draw.brightness[n].item<double>());
    EXPECT_LT((result[n][0] - expected).abs().max().item<double>(), 2e-5) << "image " << n;
  }
}

TEST(Augment, LeavesImagesAloneWhereNothingIsDrawn) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(1);
  const AugmentOptions none{
      .min_area = 1, .max_area = 1, .max_aspect = 1, .flip = 0, .brightness = 0, .contrast = 0};
  const at::Tensor images = at::rand({4, 1, 28, 28}, generator, at::kFloat);
  const at::Tensor result = apply_augmentations(images, draw_augmentations(4, none, generator));
  EXPECT_LT((result - images).abs().max().item<double>(), 1e-5);
}

TEST(Augment, DrawsWithinTheRanges) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(5);
  const AugmentOptions options = fashion_mnist_recipe().augment;
  const int64_t count = 20000;
  const AugmentDraw draw = draw_augmentations(count, options, generator);
  const at::Tensor width = draw.affine.select(1, 0).select(1, 0);
  const at::Tensor height = draw.affine.select(1, 1).select(1, 1);
  const at::Tensor area = width.abs() * height;
  EXPECT_GE(area.min().item<double>(), options.min_area * std::exp(-std::log(options.max_aspect) / 2) - 1e-6);
  EXPECT_LE(area.max().item<double>(), options.max_area + 1e-6);
  EXPECT_NEAR(width.lt(0).to(at::kDouble).mean().item<double>(), options.flip, 0.02);
  // The crop stays inside the image and reaches its border.
  const at::Tensor reach = draw.affine.select(1, 0).select(1, 2).abs() + width.abs();
  EXPECT_LE(reach.max().item<double>(), 1 + 1e-6);
  EXPECT_GT(reach.max().item<double>(), 0.99);
  EXPECT_NEAR(draw.gamma.log().max().item<double>(), options.gamma, 0.01);
  EXPECT_NEAR(draw.gamma.log().min().item<double>(), -options.gamma, 0.01);
  EXPECT_NEAR(draw.contrast.min().item<double>(), 1 - options.contrast, 0.01);
  EXPECT_NEAR(draw.contrast.max().item<double>(), 1 + options.contrast, 0.01);
  EXPECT_NEAR(draw.brightness.min().item<double>(), 1 - options.brightness, 0.01);
}

TEST(Augment, SameSeedSameDraw) {
  const auto draw = [](uint64_t seed) {
    at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
    return draw_augmentations(8, fashion_mnist_recipe().augment, generator);
  };
  EXPECT_TRUE(at::equal(draw(1).affine, draw(1).affine));
  EXPECT_TRUE(at::equal(draw(1).gamma, draw(1).gamma));
  EXPECT_FALSE(at::equal(draw(1).affine, draw(2).affine));
}

TEST(ShiftAndFlip, MovesMassWithinTheRangeAndFlipsHalf) {
  // One bright pixel per image: where it goes tells the shift; an asymmetric column tells the flip.
  const int64_t count = 400;
  at::Tensor images = at::zeros({count, 1, 20, 20}, at::kByte);
  images.select(2, 10).select(2, 14).fill_(200);
  const at::Tensor moved = shift_and_flip(images, 0.2, 7);
  ASSERT_EQ(moved.scalar_type(), at::kByte);
  const at::Tensor mass = moved.to(at::kDouble).squeeze(1);
  const at::Tensor total = mass.sum({1, 2});
  const at::Tensor row = (mass.sum(2) * at::arange(20)).sum(1) / total;
  const at::Tensor column = (mass.sum(1) * at::arange(20)).sum(1) / total;
  EXPECT_LE((row - 10).abs().max().item<double>(), 2.05);  // 0.2 of half of 20 pixels
  EXPECT_GT((row - 10).abs().max().item<double>(), 1.8);
  const at::Tensor flipped = column.lt(9.5);
  EXPECT_NEAR(flipped.to(at::kDouble).mean().item<double>(), 0.5, 0.1);
  EXPECT_LE((at::where(flipped, 19 - column, column) - 14).abs().max().item<double>(), 2.05);
  EXPECT_TRUE(at::equal(moved, shift_and_flip(images, 0.2, 7)));
  EXPECT_FALSE(at::equal(moved, shift_and_flip(images, 0.2, 8)));
}

}  // namespace
}  // namespace m2teacher
