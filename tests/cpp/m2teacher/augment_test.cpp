#include "data/augment.h"

#include "training/options.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <set>

namespace m2teacher {
namespace {

/// An image (C, H, W) in double, pixel by pixel: the formulas in the plainest form.
class Oracle {
 public:
  explicit Oracle(const at::Tensor& image) : image_(image.to(at::kDouble).div(255).contiguous()) {}

  void crop(const CropBox& box, bool flip) {
    const at::Tensor from = image_.clone();
    each([&](int64_t c, int64_t y, int64_t x) {
      // Where the centre of the output pixel falls, in pixels of the input.
      const int64_t column = flip ? width() - 1 - x : x;
      const double u =
          (box.left + box.width * (static_cast<double>(column) + 0.5) / real(width())) * real(width()) - 0.5;
      const double v = (box.top + box.height * (static_cast<double>(y) + 0.5) / real(height())) * real(height()) - 0.5;
      const auto x0 = static_cast<int64_t>(std::floor(u));
      const auto y0 = static_cast<int64_t>(std::floor(v));
      double sum = 0;
      for (const int64_t dy : {0, 1}) {
        for (const int64_t dx : {0, 1}) {
          const double weight = (1 - std::abs(u - real(x0 + dx))) * (1 - std::abs(v - real(y0 + dy)));
          const bool inside = x0 + dx >= 0 && x0 + dx < width() && y0 + dy >= 0 && y0 + dy < height();
          sum += inside ? weight * from[c][y0 + dy][x0 + dx].item<double>() : 0;
        }
      }
      return sum;
    });
  }
  void gamma(double exponent) {
    each([&](int64_t c, int64_t y, int64_t x) { return std::pow(at(c, y, x), exponent); });
  }
  void brightness(double factor) {
    each([&](int64_t c, int64_t y, int64_t x) { return clamp(at(c, y, x) * factor); });
  }
  void contrast(double factor) {
    double mean = 0;
    for (int64_t y = 0; y < height(); ++y) {
      for (int64_t x = 0; x < width(); ++x) {
        mean += luma(y, x) / real(height() * width());
      }
    }
    each([&](int64_t c, int64_t y, int64_t x) { return clamp(mean + (at(c, y, x) - mean) * factor); });
  }
  void saturation(double factor) {
    const at::Tensor grey = lumas();
    each([&](int64_t c, int64_t y, int64_t x) {
      const double base = grey[y][x].item<double>();
      return clamp(base + (at(c, y, x) - base) * factor);
    });
  }
  void greyscale() {
    const at::Tensor grey = lumas();
    each([&](int64_t, int64_t y, int64_t x) { return grey[y][x].item<double>(); });
  }
  void hue(double turns) {
    for (int64_t y = 0; y < height(); ++y) {
      for (int64_t x = 0; x < width(); ++x) {
        const auto [h, s, v] = to_hsv({at(0, y, x), at(1, y, x), at(2, y, x)});
        const auto rgb = from_hsv({h + turns - std::floor(h + turns), s, v});
        for (int64_t c = 0; c < 3; ++c) {
          image_[c][y][x] = rgb.at(static_cast<size_t>(c));
        }
      }
    }
  }
  void blur(double sigma, int64_t reach) {
    const at::Tensor from = image_.clone();
    const auto mirrored = [](int64_t i, int64_t size) { return i < 0 ? -i : (i >= size ? 2 * size - 2 - i : i); };
    double total = 0;
    for (int64_t d = -reach; d <= reach; ++d) {
      total += std::exp(-0.5 * real(d * d) / (sigma * sigma));
    }
    each([&](int64_t c, int64_t y, int64_t x) {
      double sum = 0;
      for (int64_t dy = -reach; dy <= reach; ++dy) {
        for (int64_t dx = -reach; dx <= reach; ++dx) {
          const double weight = std::exp(-0.5 * real(dx * dx + dy * dy) / (sigma * sigma)) / (total * total);
          sum += weight * from[c][mirrored(y + dy, height())][mirrored(x + dx, width())].item<double>();
        }
      }
      return sum;
    });
  }
  void solarise() {
    each([&](int64_t c, int64_t y, int64_t x) { return at(c, y, x) >= 0.5 ? 1 - at(c, y, x) : at(c, y, x); });
  }

  const at::Tensor& image() const { return image_; }

 private:
  static double real(int64_t value) { return static_cast<double>(value); }
  static double clamp(double value) { return std::clamp(value, 0.0, 1.0); }
  int64_t height() const { return image_.size(1); }
  int64_t width() const { return image_.size(2); }
  double at(int64_t c, int64_t y, int64_t x) const { return image_[c][y][x].item<double>(); }
  double luma(int64_t y, int64_t x) const {
    return image_.size(0) == 1 ? at(0, y, x) : 0.299 * at(0, y, x) + 0.587 * at(1, y, x) + 0.114 * at(2, y, x);
  }
  at::Tensor lumas() const {
    at::Tensor grey = at::empty({height(), width()}, at::kDouble);
    for (int64_t y = 0; y < height(); ++y) {
      for (int64_t x = 0; x < width(); ++x) {
        grey[y][x] = luma(y, x);
      }
    }
    return grey;
  }
  /// The textbook's, by cases.
  static std::array<double, 3> to_hsv(const std::array<double, 3>& rgb) {
    const double high = *std::max_element(rgb.begin(), rgb.end());
    const double low = *std::min_element(rgb.begin(), rgb.end());
    double hue = 0;
    if (high > low) {
      if (high == rgb[0]) {
        hue = std::fmod((rgb[1] - rgb[2]) / (high - low) + 6, 6);
      } else if (high == rgb[1]) {
        hue = (rgb[2] - rgb[0]) / (high - low) + 2;
      } else {
        hue = (rgb[0] - rgb[1]) / (high - low) + 4;
      }
    }
    return {hue / 6, high > 0 ? (high - low) / high : 0, high};
  }
  static std::array<double, 3> from_hsv(const std::array<double, 3>& hsv) {
    const auto [h, s, v] = hsv;
    const auto sector = static_cast<int>(std::floor(h * 6)) % 6;
    const double f = h * 6 - std::floor(h * 6);
    const double p = v * (1 - s);
    const double q = v * (1 - s * f);
    const double t = v * (1 - s * (1 - f));
    const std::array<std::array<double, 3>, 6> cases = {
        {{v, t, p}, {q, v, p}, {p, v, t}, {p, q, v}, {t, p, v}, {v, p, q}}};
    return cases.at(static_cast<size_t>(sector));
  }
  template <typename Value>
  void each(const Value& value) {
    at::Tensor out = at::empty_like(image_);
    for (int64_t c = 0; c < image_.size(0); ++c) {
      for (int64_t y = 0; y < height(); ++y) {
        for (int64_t x = 0; x < width(); ++x) {
          out[c][y][x] = value(c, y, x);
        }
      }
    }
    image_ = out;
  }

  at::Tensor image_;
};

at::Tensor expected(const at::Tensor& image, const ViewDraw& draw, int64_t n, bool cropped) {
  Oracle oracle(image);
  const bool flip = draw.flip[n].item<bool>();
  oracle.crop(cropped ? CropBox{} : draw.boxes[static_cast<size_t>(n)], flip);
  oracle.gamma(draw.gamma[n].item<double>());
  const bool coloured = image.size(0) == 3;
  for (int64_t turn = 0; draw.jitter[n].item<bool>() && turn < kColourOperations; ++turn) {
    const auto k = draw.order[n][turn].item<int64_t>();
    const auto factor = draw.factors[n][k].item<double>();
    switch (static_cast<ColourOperation>(k)) {
      case ColourOperation::Brightness:
        oracle.brightness(factor);
        break;
      case ColourOperation::Contrast:
        oracle.contrast(factor);
        break;
      case ColourOperation::Saturation:
        coloured ? oracle.saturation(factor) : void();
        break;
      case ColourOperation::Hue:
        coloured ? oracle.hue(factor) : void();
        break;
    }
  }
  if (coloured && draw.greyscale[n].item<bool>()) {
    oracle.greyscale();
  }
  if (draw.blur[n].item<bool>()) {
    oracle.blur(draw.sigma[n].item<double>(), draw.blur_reach);
  }
  if (draw.solarise[n].item<bool>()) {
    oracle.solarise();
  }
  return oracle.image();
}

/// Everything happens to some images, with a blur that reaches over several pixels.
AugmentOptions strong_options() {
  AugmentOptions options;
  options.gamma = 0.3;
  options.hue = 0.5;
  options.greyscale = 0.3;
  options.min_blur_sigma = 10;
  options.max_blur_sigma = 25;
  options.views[1] = {.blur = 0.5, .solarise = 0.5};
  return options;
}

at::Tensor random_images(int64_t count, int64_t channels) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(3);
  return at::randint(0, 256, {count, channels, 11, 9}, generator, at::kByte);
}

void compare_with_oracle(const at::Tensor& images, bool cropped) {
  const ImageShape shape{.channels = images.size(1), .height = images.size(2), .width = images.size(3)};
  const ViewDraw draw =
      draw_view(strong_options(), {.seed = 1, .batch = 2, .view = 1, .place = 0}, images.size(0), shape,
                /*crop=*/!cropped);
  const at::Tensor result = augment(images, draw);
  ASSERT_EQ(result.sizes(), images.sizes());
  EXPECT_GT(draw.blur_reach, 1);
  for (int64_t n = 0; n < images.size(0); ++n) {
    // Where a value falls on either side of the solarisation's threshold, rounding decides.
    const at::Tensor difference = (result[n] - expected(images[n], draw, n, cropped)).abs();
    const at::Tensor on_edge = difference.gt(2e-5).logical_and((result[n] - 0.5).abs().lt(1e-5));
    EXPECT_LT(difference.masked_fill(on_edge, 0).max().item<double>(), 2e-5) << "image " << n;
  }
}

TEST(Augment, EqualsPixelByPixelOracle) { compare_with_oracle(random_images(24, 3), /*cropped=*/false); }

TEST(Augment, EqualsPixelByPixelOracleWhereImagesCameCropped) {
  compare_with_oracle(random_images(12, 3), /*cropped=*/true);
  compare_with_oracle(random_images(12, 3).contiguous(at::MemoryFormat::ChannelsLast), /*cropped=*/true);
}

TEST(Augment, OneChannelLeavesOutWhatNeedsColours) { compare_with_oracle(random_images(16, 1), /*cropped=*/false); }

TEST(Augment, LeavesImagesAloneWhereNothingIsDrawn) {
  AugmentOptions none{.min_area = 1, .max_area = 1, .max_aspect = 1, .flip = 0, .jitter = 0, .greyscale = 0};
  none.views = {};
  const at::Tensor images = random_images(4, 3).narrow(3, 0, 9).narrow(2, 0, 9).contiguous();
  const ViewDraw draw = draw_view(none, {.seed = 0, .batch = 0, .view = 0, .place = 0}, 4,
                                  {.channels = 3, .height = 9, .width = 9}, true);
  EXPECT_LT((augment(images, draw) - to_unit_range(images)).abs().max().item<double>(), 1e-5);
}

constexpr ImageShape kImageNetShape = {.channels = 3, .height = 224, .width = 224};

double share(const at::Tensor& mask) { return mask.to(at::kDouble).mean().item<double>(); }

TEST(Augment, DrawsThePapersSharesAndRanges) {
  const AugmentOptions options;
  const int64_t count = 20000;
  const ViewDraw first =
      draw_view(options, {.seed = 5, .batch = 0, .view = 0, .place = 0}, count, kImageNetShape, false);
  const ViewDraw second =
      draw_view(options, {.seed = 5, .batch = 0, .view = 1, .place = 0}, count, kImageNetShape, false);
  EXPECT_TRUE(first.boxes.empty());
  for (const ViewDraw* draw : {&first, &second}) {
    EXPECT_NEAR(share(draw->flip), 0.5, 0.02);
    EXPECT_NEAR(share(draw->jitter), 0.8, 0.02);
    EXPECT_NEAR(share(draw->greyscale), 0.2, 0.02);
    EXPECT_TRUE(draw->gamma.eq(1).all().item<bool>());
    const std::array<std::pair<double, double>, 4> ranges = {{{0.6, 1.4}, {0.6, 1.4}, {0.8, 1.2}, {-0.1, 0.1}}};
    for (int64_t k = 0; k < kColourOperations; ++k) {
      EXPECT_NEAR(draw->factors.select(1, k).min().item<double>(), ranges.at(static_cast<size_t>(k)).first, 0.001);
      EXPECT_NEAR(draw->factors.select(1, k).max().item<double>(), ranges.at(static_cast<size_t>(k)).second, 0.001);
      for (int64_t turn = 0; turn < kColourOperations; ++turn) {
        EXPECT_NEAR(share(draw->order.select(1, turn).eq(k)), 0.25, 0.02);
      }
    }
    EXPECT_NEAR(draw->sigma.min().item<double>(), 0.1, 0.01);
    EXPECT_NEAR(draw->sigma.max().item<double>(), 2.0, 0.01);
    EXPECT_EQ(draw->blur_reach, 6);
  }
  EXPECT_EQ(share(first.blur), 1);
  EXPECT_EQ(share(first.solarise), 0);
  EXPECT_NEAR(share(second.blur), 0.1, 0.01);
  EXPECT_NEAR(share(second.solarise), 0.2, 0.01);
  // Each purpose by itself: the first view's flips say nothing of the second's.
  EXPECT_NEAR(share(first.flip.eq(second.flip)), 0.5, 0.02);
  EXPECT_NEAR(share(first.flip.eq(first.jitter)), 0.5, 0.02);
}

TEST(Augment, BlurShrinksWithTheImage) {
  const ViewDraw draw = draw_view({}, {.seed = 5, .batch = 0, .view = 0, .place = 0}, 1000,
                                  {.channels = 1, .height = 28, .width = 56}, false);
  EXPECT_NEAR(draw.sigma.max().item<double>(), 2.0 / 8, 0.002);
  EXPECT_EQ(draw.blur_reach, 1);
}

TEST(Augment, DrawsDependOnThePlaceAlone) {
  const AugmentOptions options = strong_options();
  const auto draw = [&](int64_t batch, int64_t first, int64_t count) {
    return draw_view(options, {.seed = 9, .batch = batch, .view = 0, .place = first}, count, kImageNetShape, true);
  };
  const ViewDraw whole = draw(3, 0, 8);
  const ViewDraw part = draw(3, 5, 3);
  EXPECT_TRUE(at::equal(part.factors, whole.factors.narrow(0, 5, 3)));
  EXPECT_TRUE(at::equal(part.order, whole.order.narrow(0, 5, 3)));
  EXPECT_TRUE(at::equal(part.sigma, whole.sigma.narrow(0, 5, 3)));
  EXPECT_EQ(part.boxes[0].left, whole.boxes[5].left);
  EXPECT_NE(part.boxes[0].left, whole.boxes[4].left);
  EXPECT_FALSE(at::equal(draw(4, 0, 8).factors, whole.factors));
}

void expect_inside(const CropBox& box) {
  EXPECT_GE(box.left, 0);
  EXPECT_GE(box.top, 0);
  EXPECT_GT(box.width, 0);
  EXPECT_GT(box.height, 0);
  EXPECT_LE(box.left + box.width, 1 + 1e-12);
  EXPECT_LE(box.top + box.height, 1 + 1e-12);
}

TEST(RandomCrop, HasTheAreasAndShapesAskedFor) {
  const AugmentOptions options;
  double least_area = 1;
  double most_area = 0;
  double most_left = 0;
  for (int64_t place = 0; place < 5000; ++place) {
    const CropBox box =
        random_crop(options, 300, 400, Random(Purpose::Crop, {.seed = 0, .batch = 0, .view = 0, .place = place}));
    expect_inside(box);
    const double aspect = box.width * 400 / (box.height * 300);
    EXPECT_GE(aspect, 3.0 / 4 - 1e-9);
    EXPECT_LE(aspect, 4.0 / 3 + 1e-9);
    least_area = std::min(least_area, box.width * box.height);
    most_area = std::max(most_area, box.width * box.height);
    most_left = std::max(most_left, box.left);
  }
  EXPECT_NEAR(least_area, 0.08, 0.002);
  EXPECT_GT(most_area, 0.95);
  EXPECT_GT(most_left, 0.6);
}

TEST(RandomCrop, TakesTheMiddleWhereNothingFits) {
  AugmentOptions options;
  options.min_area = 0.9;
  const Random random(Purpose::Crop, {.seed = 0, .batch = 0, .view = 0, .place = 0});
  const CropBox wide = random_crop(options, 100, 1000, random);
  expect_inside(wide);
  EXPECT_NEAR(wide.width, 4.0 / 30, 1e-9);
  EXPECT_EQ(wide.height, 1);
  EXPECT_NEAR(wide.left + wide.width / 2, 0.5, 1e-9);
  const CropBox tall = random_crop(options, 1000, 100, random);
  EXPECT_NEAR(tall.height, 4.0 / 30, 1e-9);
  EXPECT_EQ(tall.width, 1);
}

TEST(DerivedSeed, IsAnotherForEveryPurposeNumberAndSeed) {
  std::set<uint64_t> seeds;
  for (const uint64_t seed : {0, 1, 2}) {
    for (const Purpose purpose : {Purpose::Shuffle, Purpose::Crop, Purpose::Colour}) {
      for (int64_t number = 0; number < 100; ++number) {
        seeds.insert(derived_seed(seed, purpose, number));
      }
    }
  }
  EXPECT_EQ(seeds.size(), 900);
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
