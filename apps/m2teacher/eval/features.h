#pragma once

#include "data/data_options.h"
#include "data/image_source.h"
#include "models/encoder.h"

#include <ATen/core/Tensor.h>

#include <memory>

namespace m2teacher {

/// Features of images with the labels of these.
struct LabelledFeatures {
  at::Tensor features;  ///< (N, F), float32, on the encoder's device; the others are on the CPU
  at::Tensor labels;    ///< (N), int64, -1 for an image without one; undefined where there are none
  at::Tensor index;     ///< (N), int64: which images of their source; undefined where that is all of them
};

/// What the encoder makes of the images, in evaluation mode and without gradients, on its own device.
/// @param images  (N, C, H, W), uint8
/// @return (N, F), float32
at::Tensor encode(Encoder& encoder, const at::Tensor& images, const PixelStatistics& pixels);

/// The same of chosen images of a source, which need not fit into memory. Unreadable ones are left out.
/// @param index  (N), int64: which images
/// @throws UserError  none can be read, and what reading throws
LabelledFeatures encode(Encoder& encoder, const std::shared_ptr<const ImageSource>& images, const at::Tensor& index,
                        const PixelStatistics& pixels, const LoaderOptions& loader);

/// The pixels themselves, in [0, 1]: (N, C * H * W).
at::Tensor raw_pixels(const at::Tensor& images);

/// An encoder with its initial weights, whose BatchNorm statistics were estimated on the images.
/// @param images  (N, C, H, W), uint8
/// @return on the CPU
Encoder untrained_encoder(const EncoderOptions& options, const at::Tensor& images, const PixelStatistics& pixels,
                          uint64_t seed);

}  // namespace m2teacher
