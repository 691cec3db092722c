#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

namespace m2teacher {

/// An image that cannot be decoded. `what()` says why.
class ImageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Pillow's limit.
inline constexpr int64_t kMaxPixels = 178'956'970;

/// A JPEG or PNG file in memory, known by its first bytes whatever it is called. Not to be used by two threads at once.
class ImageFile {
 public:
  /// Reads the file and its header.
  /// @param max_pixels  that an image may have
  /// @throws ImageError  it is no regular file, no JPEG or PNG, or takes too much memory
  explicit ImageFile(const std::filesystem::path& path, int64_t max_pixels = kMaxPixels);

  /// Of the image as `decode` gives it without shrinking.
  int64_t height() const { return height_; }
  int64_t width() const { return width_; }

  /// Decodes the whole image, to RGB and upright, as Pillow's `ImageOps.exif_transpose` and `convert("RGB")` do: grey
  /// becomes three equal channels, CMYK is converted, transparency is dropped, EXIF's orientation is followed, colour
  /// profiles and gamma are not. Of 16 bits the higher 8 are taken.
  /// @param shrink  1, 2, 4 or 8: a JPEG's sides are divided by this, rounded up, as it is decoded, which is faster;
  ///                a PNG keeps its size
  /// @return (height, width, 3), uint8
  /// @throws ImageError  the file is damaged, cut short, or takes too long
  at::Tensor decode(int shrink) const;

 private:
  enum class Format { Jpeg, Png };

  std::vector<uint8_t> bytes_;
  Format format_ = Format::Jpeg;
  int orientation_ = 1;  // as EXIF counts them
  int64_t height_ = 0;
  int64_t width_ = 0;
};

}  // namespace m2teacher
