#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
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
inline const PixelStatistics kImageNetPixels = {{0.485, 0.456, 0.406}, {0.229, 0.224, 0.225}};

/// Those of `images`, (N, C, H, W), uint8: exact, whatever the number of threads.
PixelStatistics pixel_statistics(const at::Tensor& images);

/// Pixels in [0, 1] less their mean, divided by their standard deviation: what every encoder expects. In place.
/// @param pixels  (N, C, H, W), float32
at::Tensor standardise_(const at::Tensor& pixels, const PixelStatistics& statistics);

/// Images that can be had one by one, with their labels where there are any.
class ImageSource {
 public:
  virtual ~ImageSource() = default;

  virtual int64_t size() const = 0;
  /// Of every image that it gives.
  virtual ImageShape shape() const = 0;
  /// (size()), int64; undefined where the images have no labels.
  virtual at::Tensor labels() const = 0;
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
  const at::Tensor& images() const { return images_; }

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

  int64_t classes() const { return static_cast<int64_t>(class_names.size()); }
};

}  // namespace m2teacher
