#pragma once

#include "temporary_folder.h"

#include <ATen/ATen.h>

#include <cstdio>

#include <jpeglib.h>
#include <png.h>

#include <cstdlib>

namespace m2teacher {

/// Writes a JPEG.
/// @param pixels  (H, W, 3) as RGB, (H, W, 1) as grey or (H, W, 4) as Adobe's inverted CMYK, uint8
inline std::string jpeg_bytes(const at::Tensor& pixels, int quality = 95) {
  jpeg_compress_struct info{};
  jpeg_error_mgr errors{};
  info.err = jpeg_std_error(&errors);
  jpeg_create_compress(&info);
  unsigned char* buffer = nullptr;
  unsigned long size = 0;
  jpeg_mem_dest(&info, &buffer, &size);
  info.image_height = static_cast<unsigned>(pixels.size(0));
  info.image_width = static_cast<unsigned>(pixels.size(1));
  info.input_components = static_cast<int>(pixels.size(2));
  info.in_color_space = pixels.size(2) == 1 ? JCS_GRAYSCALE : (pixels.size(2) == 4 ? JCS_CMYK : JCS_RGB);
  jpeg_set_defaults(&info);
  jpeg_set_quality(&info, quality, TRUE);
  jpeg_start_compress(&info, TRUE);
  const at::Tensor rows = pixels.contiguous();
  while (info.next_scanline < info.image_height) {
    JSAMPROW row = rows[info.next_scanline].data_ptr<uint8_t>();
    jpeg_write_scanlines(&info, &row, 1);
  }
  jpeg_finish_compress(&info);
  jpeg_destroy_compress(&info);
  std::string bytes(reinterpret_cast<char*>(buffer), size);
  std::free(buffer);
  return bytes;
}

/// Writes a PNG.
/// @param pixels  (H, W, 3) as RGB, (H, W, 1) as grey or (H, W, 4) as RGBA, uint8
inline std::string png_bytes(const at::Tensor& pixels) {
  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  image.height = static_cast<unsigned>(pixels.size(0));
  image.width = static_cast<unsigned>(pixels.size(1));
  image.format = pixels.size(2) == 1 ? PNG_FORMAT_GRAY : (pixels.size(2) == 4 ? PNG_FORMAT_RGBA : PNG_FORMAT_RGB);
  const at::Tensor rows = pixels.contiguous();
  png_alloc_size_t size = 0;
  png_image_write_get_memory_size(image, size, 0, rows.data_ptr<uint8_t>(), 0, nullptr);
  std::string bytes(size, '\0');
  png_image_write_to_memory(&image, bytes.data(), &size, 0, rows.data_ptr<uint8_t>(), 0, nullptr);
  bytes.resize(size);
  return bytes;
}

/// Red grows from left to right and green from top to bottom, 0 to 250; blue is `blue`. (H, W, 3), uint8.
inline at::Tensor ramp(int64_t height, int64_t width, int64_t blue = 100) {
  const at::Tensor x = at::linspace(0, 250, width).expand({height, width});
  const at::Tensor y = at::linspace(0, 250, height).unsqueeze(1).expand({height, width});
  return at::stack({x, y, at::full({height, width}, static_cast<double>(blue))}, 2).round().to(at::kByte);
}

}  // namespace m2teacher
