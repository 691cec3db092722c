#pragma once

#include "data/augment_options.h"
#include "data/crop.h"
#include "data/image_source.h"

#include <ATen/core/Tensor.h>

#include <vector>

namespace m2teacher {

/// Operations of the colour jitter, applied to each image in an order of its own.
enum class ColourOperation { Brightness, Contrast, Saturation, Hue };
inline constexpr int64_t kColourOperations = 4;

/// What was drawn for one view of N images, on the CPU.
struct ViewDraw {
  std::vector<CropBox> boxes;  ///< N; empty where the images were cropped as they were read
  at::Tensor flip;             ///< (N), bool
  at::Tensor gamma;            ///< (N), exponent
  at::Tensor jitter;           ///< (N), bool: whether the four operations below are done
  at::Tensor factors;          ///< (N, 4), float32, by `ColourOperation`: factors, and for the hue the move in turns
  at::Tensor order;            ///< (N, 4), int64: the operation that is done first, second, ...
  at::Tensor greyscale;        ///< (N), bool
  at::Tensor blur;             ///< (N), bool
  at::Tensor sigma;            ///< (N), float32: of the blur, in pixels of the output
  int64_t blur_reach = 0;      ///< pixels that a blur looks to either side, the same for all
  at::Tensor solarise;         ///< (N), bool
};

/// Draws for one view of the images at places `first` to `first + count - 1` of a batch.
/// @param at     its place is that of the first image
/// @param shape  of the output
/// @param crop   whether boxes are drawn, for images of that shape
ViewDraw draw_view(const AugmentOptions& options, const ViewPlace& at, int64_t count, const ImageShape& shape,
                   bool crop);

/// One view of images: what `AugmentOptions` lists, in its order. Values are clamped to [0, 1] where torchvision does.
///
/// @param images  (N, C, H, W), uint8, on any device
/// @return (N, C, H, W), float32 in [0, 1], there
at::Tensor augment(const at::Tensor& images, const ViewDraw& draw);

/// Pixels 0..255 to float32 in [0, 1].
at::Tensor to_unit_range(const at::Tensor& images);

/// Shifts each image by up to `shift` in both directions (as a share of half the image's side; what comes into view is
/// black) and mirrors half of them.
///
/// @param images  (N, C, H, W), uint8
/// @return (N, C, H, W), uint8
at::Tensor shift_and_flip(const at::Tensor& images, double shift, uint64_t seed);

}  // namespace m2teacher
