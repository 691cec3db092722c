#include "data/decode_image.h"

#include "image_files.h"

#include <gtest/gtest.h>
#include <zlib.h>

namespace m2teacher {
namespace {

at::Tensor decode(const std::string& bytes, int shrink = 1) {
  const TemporaryFolder folder;
  write_bytes(folder / "image", bytes);
  const ImageFile file(folder / "image");
  at::Tensor pixels = file.decode(shrink);
  if (shrink == 1) {
    EXPECT_EQ(pixels.sizes(), at::IntArrayRef({file.height(), file.width(), 3}));
  }
  return pixels;
}

void expect_error(const std::string& bytes, const std::string& part) {
  try {
    decode(bytes);
    ADD_FAILURE() << "no error, expected one with: " << part;
  } catch (const ImageError& error) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

double worst(const at::Tensor& pixels, const at::Tensor& expected) {
  return (pixels.to(at::kInt) - expected.to(at::kInt)).abs().max().item<double>();
}

TEST(DecodeImage, PngIsExact) {
  const at::Tensor pixels = at::randint(0, 256, {13, 7, 4}, at::kByte);
  EXPECT_TRUE(at::equal(decode(png_bytes(pixels.narrow(2, 0, 3))), pixels.narrow(2, 0, 3)));
  EXPECT_TRUE(at::equal(decode(png_bytes(pixels.narrow(2, 0, 1))), pixels.narrow(2, 0, 1).expand({13, 7, 3})));
  EXPECT_TRUE(at::equal(decode(png_bytes(pixels)), pixels.narrow(2, 0, 3)));  // what is transparent is there
}

TEST(DecodeImage, SixteenBitsAreRoundedToEight) {
  const at::Tensor pixels = at::randint(0, 65536, {13, 7, 3}, at::kInt);
  const at::Tensor expected = (pixels.to(at::kDouble) / 257).round();
  EXPECT_LE(worst(decode(png_bytes_of_16_bits(pixels)), expected), 1);
}

TEST(DecodeImage, JpegIsNearlyExactWhereTheImageIsSmooth) {
  const at::Tensor pixels = ramp(64, 48);
  EXPECT_LE(worst(decode(jpeg_bytes(pixels)), pixels), 8);
  const at::Tensor grey = pixels.narrow(2, 0, 1);
  EXPECT_LE(worst(decode(jpeg_bytes(grey)), grey.expand({64, 48, 3})), 4);
}

TEST(DecodeImage, CmykIsConverted) {
  // Inverted inks, as Adobe writes them: the share of light that each lets through.
  const at::Tensor inks = at::cat({ramp(32, 32), at::full({32, 32, 1}, 128, at::kByte)}, 2);
  const at::Tensor expected = inks.narrow(2, 0, 3).to(at::kFloat) * (128.0 / 255);
  EXPECT_LE(worst(decode(jpeg_bytes(inks)), expected.round()), 8);
}

TEST(DecodeImage, ShrinksAJpegAsItIsDecoded) {
  const at::Tensor small = decode(jpeg_bytes(ramp(160, 80)), 4);
  EXPECT_LE(worst(small, ramp(40, 20)), 10);
  EXPECT_EQ(decode(jpeg_bytes(ramp(13, 9)), 8).sizes(), at::IntArrayRef({2, 2, 3}));
  EXPECT_EQ(decode(png_bytes(ramp(13, 9)), 8).sizes(), at::IntArrayRef({13, 9, 3}));
}

TEST(DecodeImage, RefusesWhatIsDamaged) {
  expect_error("", "is empty");
  expect_error("hello, world", "neither a JPEG nor a PNG");
  for (const std::string& whole : {jpeg_bytes(ramp(64, 64)), png_bytes(ramp(64, 64))}) {
    // A PNG whose pixels are all there is taken without its last bytes.
    for (const double part : {0.02, 0.3, 0.6, 0.8}) {
      EXPECT_THROW(decode(whole.substr(0, static_cast<size_t>(part * static_cast<double>(whole.size())))), ImageError)
          << part << " of " << whole.size();
    }
  }
  std::string flipped = png_bytes(ramp(64, 64));
  flipped[flipped.size() / 2] ^= 0x55;
  EXPECT_THROW(decode(flipped), ImageError);
  EXPECT_THROW(ImageFile("/nowhere/image.png"), ImageError);
  EXPECT_THROW(ImageFile("/tmp"), ImageError);
}

TEST(DecodeImage, RefusesAnImageThatWouldFillTheMemory) {
  std::string bytes = png_bytes(ramp(8, 8));
  // The header says 60000 x 60000; its checksum is made to fit.
  const std::string sizes("\0\0\xea\x60\0\0\xea\x60", 8);
  bytes.replace(16, 8, sizes);
  const uint32_t crc = static_cast<uint32_t>(crc32(0, reinterpret_cast<const Bytef*>(bytes.data() + 12), 17));
  for (int i = 0; i < 4; ++i) {
    bytes[static_cast<size_t>(29 + i)] = static_cast<char>(crc >> (24 - 8 * i));
  }
  expect_error(bytes, "60000 x 60000 pixels");
}

TEST(DecodeImage, TakesAsManyPixelsAsItIsTold) {
  const TemporaryFolder folder;
  write_bytes(folder / "image", png_bytes(ramp(8, 8)));
  EXPECT_EQ(ImageFile(folder / "image", /*max_pixels=*/64).height(), 8);
  EXPECT_THROW(ImageFile(folder / "image", /*max_pixels=*/63), ImageError);
}

/// A progressive JPEG that says a part of its pixels again and again.
std::string jpeg_of_many_scans(int scans) {
  const at::Tensor pixels = ramp(16, 16);
  jpeg_compress_struct info{};
  jpeg_error_mgr errors{};
  info.err = jpeg_std_error(&errors);
  jpeg_create_compress(&info);
  unsigned char* buffer = nullptr;
  unsigned long size = 0;
  jpeg_mem_dest(&info, &buffer, &size);
  info.image_height = info.image_width = 16;
  info.input_components = 3;
  info.in_color_space = JCS_RGB;
  jpeg_set_defaults(&info);
  jpeg_simple_progression(&info);
  jpeg_start_compress(&info, TRUE);
  while (info.next_scanline < info.image_height) {
    JSAMPROW row = pixels[info.next_scanline].data_ptr<uint8_t>();
    jpeg_write_scanlines(&info, &row, 1);
  }
  jpeg_finish_compress(&info);
  jpeg_destroy_compress(&info);
  const std::string bytes(reinterpret_cast<char*>(buffer), size);
  std::free(buffer);
  // The first scan, up to the tables of the second.
  const size_t first = bytes.find("\xff\xda");
  const size_t end = bytes.find("\xff\xc4", first);
  std::string out = bytes.substr(0, end);
  for (int i = 0; i < scans; ++i) {
    out += bytes.substr(first, end - first);
  }
  return out + bytes.substr(end);
}

TEST(DecodeImage, TakesNoMoreScansThanAFileCanUse) {
  EXPECT_EQ(decode(jpeg_of_many_scans(400)).sizes(), at::IntArrayRef({16, 16, 3}));
  expect_error(jpeg_of_many_scans(600), "has more than 500 scans");
}

}  // namespace
}  // namespace m2teacher
