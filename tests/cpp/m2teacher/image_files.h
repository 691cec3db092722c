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

/// Writes a PNG of 16 bits that says nothing of its colours.
/// @param pixels  (H, W, 3) as RGB, int32 in [0, 65535]
inline std::string png_bytes_of_16_bits(const at::Tensor& pixels) {
  std::string bytes;
  png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, nullptr, nullptr, nullptr);
  png_infop info = png_create_info_struct(png);
  const auto append = [](png_structp writer, png_bytep data, size_t size) {
    static_cast<std::string*>(png_get_io_ptr(writer))->append(reinterpret_cast<const char*>(data), size);
  };
  png_set_write_fn(png, &bytes, append, nullptr);
  png_set_IHDR(png, info, static_cast<unsigned>(pixels.size(1)), static_cast<unsigned>(pixels.size(0)), 16,
               PNG_COLOR_TYPE_RGB, PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
  png_write_info(png, info);
  // The format has the high byte first.
  const at::Tensor rows = at::stack({pixels.floor_divide(256), pixels.remainder(256)}, 3).to(at::kByte).contiguous();
  for (int64_t row = 0; row < rows.size(0); ++row) {
    png_write_row(png, rows[row].data_ptr<uint8_t>());
  }
  png_write_end(png, nullptr);
  png_destroy_write_struct(&png, &info);
  return bytes;
}

/// Red grows from left to right and green from top to bottom, 0 to 250; blue is `blue`. (H, W, 3), uint8.
inline at::Tensor ramp(int64_t height, int64_t width, int64_t blue = 100) {
  const at::Tensor x = at::linspace(0, 250, width).expand({height, width});
  const at::Tensor y = at::linspace(0, 250, height).unsqueeze(1).expand({height, width});
  return at::stack({x, y, at::full({height, width}, static_cast<double>(blue))}, 2).round().to(at::kByte);
}

}  // namespace m2teacher
