#include "data/decode_image.h"

#include <ATen/ops/empty.h>

// jpeglib.h uses FILE and size_t without including what declares them.
#include <cstdio>

#include <jerror.h>
#include <jpeglib.h>
#include <png.h>

#include <array>
#include <cerrno>
#include <csetjmp>
#include <cstring>
#include <fstream>

namespace m2teacher {
namespace {

constexpr int64_t kChannels = 3;
constexpr int64_t kCmykChannels = 4;
constexpr int64_t kMaxPixels = int64_t{1} << 28;
constexpr std::array<uint8_t, 3> kJpegStart = {0xff, 0xd8, 0xff};
constexpr std::array<uint8_t, 8> kPngStart = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'};

std::vector<uint8_t> read_file(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary | std::ios::ate);
  if (!stream || std::filesystem::is_directory(path)) {
    throw ImageError("cannot be opened");
  }
  std::vector<uint8_t> bytes(static_cast<size_t>(stream.tellg()));
  stream.seekg(0);
  if (!bytes.empty() &&
      !stream.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()))) {
    throw ImageError("cannot be read");
  }
  return bytes;
}

template <size_t N>
bool starts_with(const std::vector<uint8_t>& bytes, const std::array<uint8_t, N>& start) {
  return bytes.size() >= N && std::memcmp(bytes.data(), start.data(), N) == 0;
}

void check_size(int64_t height, int64_t width) {
  if (height < 1 || width < 1 || height > kMaxPixels / width) {
    throw ImageError("has " + std::to_string(width) + " x " + std::to_string(height) + " pixels, at most " +
                     std::to_string(kMaxPixels) + " are read");
  }
}

/// What libjpeg calls where it would otherwise end the process: it leaves by longjmp, as the library is C.
struct JpegErrors {
  jpeg_error_mgr base;
  std::jmp_buf leave;
  char message[JMSG_LENGTH_MAX];
};

[[noreturn]] void leave_jpeg(j_common_ptr info) {
  auto* errors = reinterpret_cast<JpegErrors*>(info->err);
  info->err->format_message(info, errors->message);
  std::longjmp(errors->leave, 1);
}

/// Warnings that mean that pixels are missing are errors; others (stray bytes between segments) pass.
void judge_jpeg_warning(j_common_ptr info, int level) {
  const int code = info->err->msg_code;
  if (level < 0 && (code == JWRN_JPEG_EOF || code == JWRN_HIT_MARKER || code == JWRN_HUFF_BAD_CODE)) {
    leave_jpeg(info);
  }
}

/// Owns libjpeg's state; `run` calls something that may leave by longjmp, in a frame that has nothing to destroy.
class JpegReader {
 public:
  explicit JpegReader(const std::vector<uint8_t>& bytes) {
    info_.err = jpeg_std_error(&errors_.base);
    errors_.base.error_exit = leave_jpeg;
    errors_.base.emit_message = judge_jpeg_warning;
    run([&] {
      jpeg_create_decompress(&info_);
      jpeg_mem_src(&info_, bytes.data(), bytes.size());
      jpeg_read_header(&info_, TRUE);
    });
  }
  ~JpegReader() { jpeg_destroy_decompress(&info_); }
  JpegReader(const JpegReader&) = delete;
  JpegReader& operator=(const JpegReader&) = delete;

  int64_t height() const { return info_.image_height; }
  int64_t width() const { return info_.image_width; }

  at::Tensor decode(int shrink) {
    const bool cmyk = info_.jpeg_color_space == JCS_CMYK || info_.jpeg_color_space == JCS_YCCK;
    info_.out_color_space = cmyk ? JCS_CMYK : JCS_RGB;
    info_.scale_num = 1;
    info_.scale_denom = static_cast<unsigned>(shrink);
    run([&] { jpeg_start_decompress(&info_); });
    const int64_t channels = cmyk ? kCmykChannels : kChannels;
    at::Tensor pixels = at::empty({info_.output_height, info_.output_width, channels}, at::kByte);
    auto* const data = pixels.mutable_data_ptr<uint8_t>();
    const int64_t row_bytes = info_.output_width * channels;
    run([&] {
      while (info_.output_scanline < info_.output_height) {
        JSAMPROW row = data + info_.output_scanline * row_bytes;
        jpeg_read_scanlines(&info_, &row, 1);
      }
      jpeg_finish_decompress(&info_);
    });
    return cmyk ? cmyk_to_rgb(pixels) : pixels;
  }

 private:
  template <typename Call>
  void run(const Call& call) {
    if (setjmp(errors_.leave) != 0) {
      throw ImageError(errors_.message);
    }
    call();
  }

  /// Adobe's files, which are the ones there are, hold inverted values.
  at::Tensor cmyk_to_rgb(const at::Tensor& pixels) const {
    const bool inverted = info_.saw_Adobe_marker != 0;
    const int64_t count = pixels.size(0) * pixels.size(1);
    at::Tensor rgb = at::empty({pixels.size(0), pixels.size(1), kChannels}, at::kByte);
    const uint8_t* from = pixels.const_data_ptr<uint8_t>();
    auto* to = rgb.mutable_data_ptr<uint8_t>();
    for (int64_t i = 0; i < count; ++i, from += kCmykChannels) {
      for (int64_t c = 0; c < kChannels; ++c) {
        const int ink = inverted ? from[c] : UINT8_MAX - from[c];
        const int black = inverted ? from[kChannels] : UINT8_MAX - from[kChannels];
        *to++ = static_cast<uint8_t>((ink * black + UINT8_MAX / 2) / UINT8_MAX);
      }
    }
    return rgb;
  }

  JpegErrors errors_{};
  jpeg_decompress_struct info_{};
};

/// libpng's own simplified reader.
class PngReader {
 public:
  explicit PngReader(const std::vector<uint8_t>& bytes) {
    image_.version = PNG_IMAGE_VERSION;
    if (png_image_begin_read_from_memory(&image_, bytes.data(), bytes.size()) == 0) {
      throw ImageError(image_.message);
    }
  }
  ~PngReader() { png_image_free(&image_); }
  PngReader(const PngReader&) = delete;
  PngReader& operator=(const PngReader&) = delete;

  int64_t height() const { return image_.height; }
  int64_t width() const { return image_.width; }

  at::Tensor decode() {
    image_.format = PNG_FORMAT_RGBA;
    at::Tensor pixels = at::empty({height(), width(), kChannels + 1}, at::kByte);
    if (png_image_finish_read(&image_, nullptr, pixels.mutable_data_ptr<uint8_t>(), 0, nullptr) == 0) {
      throw ImageError(image_.message);
    }
    return pixels.narrow(2, 0, kChannels).contiguous();
  }

 private:
  png_image image_{};
};

}  // namespace

ImageFile::ImageFile(const std::filesystem::path& path) : bytes_(read_file(path)) {
  if (starts_with(bytes_, kJpegStart)) {
    const JpegReader reader(bytes_);
    height_ = reader.height();
    width_ = reader.width();
  } else if (starts_with(bytes_, kPngStart)) {
    format_ = Format::Png;
    const PngReader reader(bytes_);
    height_ = reader.height();
    width_ = reader.width();
  } else {
    throw ImageError(bytes_.empty() ? "is empty" : "is neither a JPEG nor a PNG file");
  }
  check_size(height_, width_);
}

at::Tensor ImageFile::decode(int shrink) const {
  return format_ == Format::Jpeg ? JpegReader(bytes_).decode(shrink) : PngReader(bytes_).decode();
}

}  // namespace m2teacher
