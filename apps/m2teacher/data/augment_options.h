#pragma once

#include <array>
#include <cstdint>

namespace m2teacher {

/// How often the two views of an image are treated differently.
struct ViewAugmentOptions {
  double blur = 0;      ///< share of images blurred
  double solarise = 0;  ///< share of images whose values of 0.5 and more are inverted (v -> 1 - v)
};

/// The paper's augmentations, which are BYOL's (arXiv 2006.07733, appendix B) with the figures of the published code
/// (github.com/zengarden/momentum2-teacher, data/transforms.py). In this order: crop, flip, colour jitter (brightness,
/// contrast, saturation and hue in an order drawn for each image), greyscale, blur, solarise. Everything is drawn for
/// each view of each image by itself. Images of one channel are left alone by saturation, hue and greyscale.
struct AugmentOptions {
  double min_area = 0.08;  ///< area of the crop, as a share of the image's, in [min_area, max_area]
  double max_area = 1.0;
  double max_aspect =
      4.0 / 3;              ///< width / height of the crop in [1 / max_aspect, max_aspect], uniform in its logarithm
  double flip = 0.5;        ///< share of images mirrored left to right
  double jitter = 0.8;      ///< share of images whose colours are changed
  double brightness = 0.4;  ///< values times a factor of 1 +- brightness
  double contrast = 0.4;    ///< distance to the image's mean grey times a factor of 1 +- contrast
  double saturation = 0.2;  ///< distance to each pixel's grey times a factor of 1 +- saturation
  double hue = 0.1;         ///< hue moved by +- hue, in turns
  double gamma = 0;         ///< exponent of the values in e^[-gamma, gamma], before the other colours; not in the paper
  double greyscale = 0.2;   ///< share of images whose colours are taken away
  /// Standard deviation of the Gaussian blur in [min_blur_sigma, max_blur_sigma], in pixels of an image whose side is
  /// 224; it shrinks with the image.
  double min_blur_sigma = 0.1;
  double max_blur_sigma = 2.0;
  std::array<ViewAugmentOptions, 2> views = {ViewAugmentOptions{.blur = 1.0, .solarise = 0.0},
                                             ViewAugmentOptions{.blur = 0.1, .solarise = 0.2}};
};

}  // namespace m2teacher
