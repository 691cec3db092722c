#pragma once

#include "data/data_options.h"
#include "data/image_source.h"

#include <filesystem>
#include <mutex>
#include <string>
#include <vector>

namespace m2teacher {

/// JPEG and PNG files, decoded, cropped and scaled to one size whenever they are asked for. Any number of threads may
/// read at once.
class FolderSource : public ImageSource {
 public:
  /// @param files    paths to read, and what their names in messages are
  /// @param labels   (N), int64, -1 for images without one; or undefined
  FolderSource(std::vector<std::filesystem::path> files, at::Tensor labels, const DataOptions& options);

  int64_t size() const override { return static_cast<int64_t>(files_.size()); }
  ImageShape shape() const override;
  at::Tensor labels() const override { return labels_; }

  std::vector<std::filesystem::path> files() const override;

  /// An image that cannot be read, for whatever reason, is counted, and named on stderr where that is new.
  bool read(int64_t index, const ChooseBoxes& choose, const std::vector<uint8_t*>& into) const override;

  /// The shorter side scaled to side / centre_crop, then the centre.
  bool read_centre(int64_t index, uint8_t* into) const override;

  /// How many images could not be read so far; each counts once.
  int64_t unreadable() const override;

 private:
  void note_unreadable(int64_t index, const std::string& reason) const;

  std::vector<std::filesystem::path> files_;
  at::Tensor labels_;
  int64_t side_;
  double centre_crop_;
  bool strict_;
  int64_t max_pixels_;
  mutable std::mutex mutex_;
  mutable std::vector<bool> known_unreadable_;
};

/// A tree of JPEG and PNG files, as `list_images` finds them. The training images are those below "train/", the test
/// images those below "test/" or "val/"; without a "train/" all are for training. An image's label is the first folder
/// on its way from there, by name; images that lie in none have no label. A single folder beside such images is no
/// class: then none has a label. Pixel statistics are ImageNet's.
///
/// @throws UserError  there are no images, or the test images have a class that the training images have not
Dataset load_image_folder(const DataOptions& options);

}  // namespace m2teacher
