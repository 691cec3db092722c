#pragma once

#include "data/data_options.h"
#include "data/image_source.h"
#include "models/encoder.h"

#include <ATen/core/Tensor.h>

namespace m2teacher {

/// Features of images with the labels of these.
struct LabelledFeatures {
  at::Tensor features;  ///< (N, F), float32
  at::Tensor labels;    ///< (N), int64
};

/// What the encoder makes of the images, in evaluation mode and without gradients.
/// @param images  (N, C, H, W), uint8
/// @return (N, F), float32
at::Tensor encode(Encoder& encoder, const at::Tensor& images, const PixelStatistics& pixels);

/// The same of the first `count` images of a set, which need not fit into memory.
at::Tensor encode(Encoder& encoder, const ImageSource& images, int64_t count, const PixelStatistics& pixels,
                  const LoaderOptions& loader);

/// The pixels themselves, in [0, 1]: (N, C * H * W).
at::Tensor raw_pixels(const at::Tensor& images);

/// An encoder with its initial weights, whose BatchNorm statistics were estimated on the images.
/// @param images  (N, C, H, W), uint8
Encoder untrained_encoder(const EncoderOptions& options, const at::Tensor& images, const PixelStatistics& pixels,
                          uint64_t seed);

}  // namespace m2teacher
