#pragma once

#include "data/crop.h"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace m2teacher {

/// Sizes of an image.
struct ImageShape {
  int64_t channels = 0;
  int64_t height = 0;
  int64_t width = 0;

  bool operator==(const ImageShape&) const = default;
};

/// Mean and standard deviation of each channel, pixels in [0, 1].
struct PixelStatistics {
  std::vector<double> mean;
  std::vector<double> std;

  bool operator==(const PixelStatistics&) const = default;
};

/// ImageNet's, which folders of images are standardised by (arXiv 2006.07733, appendix B).
inline PixelStatistics imagenet_pixels() { return {{0.485, 0.456, 0.406}, {0.229, 0.224, 0.225}}; }

/// Those of `images`, (N, C, H, W), uint8: exact, whatever the number of threads.
PixelStatistics pixel_statistics(const at::Tensor& images);

/// Pixels in [0, 1] less their mean, divided by their standard deviation: what every encoder expects. In place.
/// @param pixels  (N, C, H, W), float32
at::Tensor standardise_(const at::Tensor& pixels, const PixelStatistics& statistics);

/// Images that can be had one by one, by any number of threads at once, with their labels where there are any.
class ImageSource {
 public:
  virtual ~ImageSource() = default;

  virtual int64_t size() const = 0;
  /// Of every image that it gives.
  virtual ImageShape shape() const = 0;
  /// (size()), int64, -1 for an image that has no label; undefined where none has one.
  virtual at::Tensor labels() const = 0;
  /// The file of each image, where each has one of its own; none otherwise.
  virtual std::vector<std::filesystem::path> files() const { return {}; }
  /// All images, where they are kept in memory: (size(), C, H, W), uint8; undefined where they are read one by one.
  virtual at::Tensor in_memory() const { return {}; }

  /// Chooses parts of an image whose size it is told.
  using ChooseBoxes = std::function<std::vector<CropBox>(int64_t height, int64_t width)>;

  /// Reads an image once and writes the chosen parts of it, scaled to `shape()` (bilinear, antialiased): one after the
  /// other, (height, width, channels) each.
  /// @return whether it could be read
  /// @throws UserError  it could not be read, and the source is strict
  virtual bool read(int64_t index, const ChooseBoxes& choose, const std::vector<uint8_t*>& into) const = 0;
  /// Reads an image as evaluation sees it: (height, width, channels).
  virtual bool read_centre(int64_t index, uint8_t* into) const = 0;
  /// How many images turned out to be unreadable so far.
  virtual int64_t unreadable() const { return 0; }
};

/// Images in memory.
class TensorSource : public ImageSource {
 public:
  /// @param images  (N, C, H, W), uint8
  /// @param labels  (N), int64, or undefined
  TensorSource(at::Tensor images, at::Tensor labels);

  int64_t size() const override { return images_.size(0); }
  ImageShape shape() const override;
  at::Tensor labels() const override { return labels_; }
  at::Tensor in_memory() const override { return images_; }
  bool read(int64_t index, const ChooseBoxes& choose, const std::vector<uint8_t*>& into) const override;
  /// The whole image.
  bool read_centre(int64_t index, uint8_t* into) const override;

 private:
  at::Tensor images_;
  at::Tensor labels_;
};

/// "0", "1", ... up to the largest of the labels, which are in [0, 255].
std::vector<std::string> numbered_classes(const std::vector<at::Tensor>& labels);

/// All images of a source that is in memory: (N, C, H, W), uint8.
/// @throws UserError  it is not
at::Tensor images_in_memory(const ImageSource& source);

/// A training set, and what evaluation needs: a test set and the classes' names, where there are any.
struct Dataset {
  std::shared_ptr<const ImageSource> train;
  std::shared_ptr<const ImageSource> test;  ///< null where there is none
  std::vector<std::string> class_names;     ///< empty where there are no labels
  PixelStatistics pixels;                   ///< what the encoders' input is standardised by
  std::vector<std::string> notes;           ///< what users should know of how the images were found

  int64_t classes() const { return static_cast<int64_t>(class_names.size()); }
};

}  // namespace m2teacher
