#include "data/decode_image.h"

#include "output/file_descriptor.h"

#include <ATen/ops/empty.h>

// jpeglib.h uses FILE and size_t without including what declares them.
#include <cstdio>

#include <fcntl.h>
#include <jerror.h>
#include <jpeglib.h>
#include <png.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csetjmp>
#include <cstring>
#include <ctime>
#include <span>

namespace m2teacher {
namespace {

using Bytes = std::span<const uint8_t>;

constexpr int64_t kChannels = 3;
constexpr int64_t kCmykChannels = 4;
// What one image may take, so that no file can fill the memory or hold a thread.
constexpr int64_t kMaxFileBytes = int64_t{1} << 29;
constexpr int kMaxScans = 500;
constexpr double kMaxCpuSeconds = 60;
constexpr std::array<uint8_t, 3> kJpegStart = {0xff, 0xd8, 0xff};
constexpr std::array<uint8_t, 8> kPngStart = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'};
constexpr std::array<uint8_t, 6> kExifStart = {'E', 'x', 'i', 'f', 0, 0};

std::vector<uint8_t> read_file(const std::filesystem::path& path) {
  // Opening a pipe would wait for somebody to write into it.
  const FileDescriptor file(path, O_RDONLY | O_NONBLOCK);
  struct stat status = {};
  if (!file.is_open() || fstat(file.get(), &status) != 0) {
    throw ImageError(std::string("cannot be opened: ") + std::strerror(errno));
  }
  if (!S_ISREG(status.st_mode)) {
    throw ImageError("is no regular file");
  }
  if (status.st_size > kMaxFileBytes) {
    throw ImageError("has " + std::to_string(status.st_size) + " bytes, at most " + std::to_string(kMaxFileBytes) +
                     " are read");
  }
  std::vector<uint8_t> bytes(static_cast<size_t>(status.st_size));
  for (size_t have = 0; have < bytes.size();) {
    const ssize_t got = ::read(file.get(), bytes.data() + have, bytes.size() - have);
    if (got < 0 && errno != EINTR) {
      throw ImageError(std::string("cannot be read: ") + std::strerror(errno));
    }
    if (got == 0) {  // it has become shorter
      bytes.resize(have);
    }
    have += static_cast<size_t>(std::max<ssize_t>(got, 0));
  }
  return bytes;
}

template <size_t N>
bool starts_with(Bytes bytes, const std::array<uint8_t, N>& start) {
  return bytes.size() >= N && std::memcmp(bytes.data(), start.data(), N) == 0;
}

void check_size(int64_t height, int64_t width, int64_t max_pixels) {
  if (height < 1 || width < 1 || height > max_pixels / width) {
    throw ImageError("has " + std::to_string(width) + " x " + std::to_string(height) + " pixels, at most " +
                     std::to_string(max_pixels) + " are read (--max-pixels)");
  }
}

/// CPU time of this thread: a process that is stopped uses none.
double cpu_seconds() {
  timespec now = {};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

/// How the camera was held, 1 to 8 as the TIFF tag of that name; 1 where EXIF data do not say.
/// @param exif  with or without the mark that JPEG files put before it
int exif_orientation(Bytes exif) {
  constexpr int kUpright = 1;
  constexpr uint32_t kLastOrientation = 8;
  constexpr uint32_t kOrientationTag = 0x0112;
  constexpr uint32_t kLongType = 4;
  constexpr uint32_t kTiffMark = 42;
  constexpr size_t kEntryBytes = 12;
  if (starts_with(exif, kExifStart)) {
    exif = exif.subspan(kExifStart.size());
  }
  if (exif.size() < 2 || exif[0] != exif[1] || (exif[0] != 'I' && exif[0] != 'M')) {
    return kUpright;
  }
  // What lies outside reads as 0.
  const auto number = [exif](size_t at, size_t bytes) {
    uint32_t value = 0;
    for (size_t i = 0; i < bytes; ++i) {
      const size_t place = at + (exif[0] == 'I' ? bytes - 1 - i : i);
      value = value << 8U | (place < exif.size() ? exif[place] : 0U);
    }
    return value;
  };
  const size_t directory = number(4, 4);
  const size_t entries = number(2, 2) == kTiffMark ? number(directory, 2) : 0;
  for (size_t entry = directory + 2; entry < directory + 2 + entries * kEntryBytes; entry += kEntryBytes) {
    if (number(entry, 2) == kOrientationTag) {
      const uint32_t value = number(entry + 8, number(entry + 2, 2) == kLongType ? 4 : 2);
      return value >= 1 && value <= kLastOrientation ? static_cast<int>(value) : kUpright;
    }
  }
  return kUpright;
}

/// Whether rows become columns.
bool turns_by_a_quarter(int orientation) { return orientation >= 5; }

/// The image as the photographer saw it.
/// @param pixels  (height, width, 3)
at::Tensor upright(const at::Tensor& pixels, int orientation) {
  switch (orientation) {
    case 2:
      return pixels.flip({1});
    case 3:
      return pixels.flip({0, 1});
    case 4:
      return pixels.flip({0});
    case 5:
      return pixels.transpose(0, 1);
    case 6:
      return pixels.transpose(0, 1).flip({1});
    case 7:
      return pixels.transpose(0, 1).flip({0, 1});
    case 8:
      return pixels.transpose(0, 1).flip({0});
    default:
      return pixels;
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

/// libjpeg calls this now and then as it decodes.
struct JpegProgress {
  jpeg_progress_mgr base;
  double end;  ///< of the CPU time that the image may take
};

/// A file may say the same pixels again and again, which takes time for each of its scans.
void judge_jpeg_progress(j_common_ptr info) {
  auto* errors = reinterpret_cast<JpegErrors*>(info->err);
  const auto* progress = reinterpret_cast<const JpegProgress*>(info->progress);
  const int scan = reinterpret_cast<j_decompress_ptr>(info)->input_scan_number;
  if (scan > kMaxScans) {
    std::snprintf(errors->message, sizeof(errors->message), "has more than %d scans", kMaxScans);
    std::longjmp(errors->leave, 1);
  }
  if (cpu_seconds() > progress->end) {
    std::snprintf(errors->message, sizeof(errors->message), "takes more than %.0f s to decode", kMaxCpuSeconds);
    std::longjmp(errors->leave, 1);
  }
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
  /// The constructor that this one begins with makes an object whose destructor runs whatever is thrown here.
  explicit JpegReader(const std::vector<uint8_t>& bytes) : JpegReader() {
    run([&] {
      jpeg_save_markers(&info_, JPEG_APP0 + 1, UINT16_MAX);
      jpeg_mem_src(&info_, bytes.data(), bytes.size());
      jpeg_read_header(&info_, TRUE);
    });
  }
  ~JpegReader() { jpeg_destroy_decompress(&info_); }
  JpegReader(const JpegReader&) = delete;
  JpegReader& operator=(const JpegReader&) = delete;

  /// Of its first EXIF data.
  int orientation() const {
    for (const jpeg_marker_struct* marker = info_.marker_list; marker != nullptr; marker = marker->next) {
      const Bytes data(marker->data, marker->data_length);
      if (starts_with(data, kExifStart)) {
        return exif_orientation(data);
      }
    }
    return exif_orientation({});
  }

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
  JpegReader() {
    info_.err = jpeg_std_error(&errors_.base);
    errors_.base.error_exit = leave_jpeg;
    errors_.base.emit_message = judge_jpeg_warning;
    run([&] { jpeg_create_decompress(&info_); });
    progress_.base.progress_monitor = judge_jpeg_progress;
    progress_.end = cpu_seconds() + kMaxCpuSeconds;
    info_.progress = &progress_.base;
  }

  template <typename Call>
  void run(const Call& call) {
    if (setjmp(errors_.leave) != 0) {
      throw ImageError(errors_.message);
    }
    call();
  }

  /// Inks are taken as inverted, which those are that Adobe's programs write: others are hardly found, and Pillow
  /// takes them so, too.
  static at::Tensor cmyk_to_rgb(const at::Tensor& pixels) {
    const int64_t count = pixels.size(0) * pixels.size(1);
    at::Tensor rgb = at::empty({pixels.size(0), pixels.size(1), kChannels}, at::kByte);
    const uint8_t* from = pixels.const_data_ptr<uint8_t>();
    auto* to = rgb.mutable_data_ptr<uint8_t>();
    for (int64_t i = 0; i < count; ++i, from += kCmykChannels) {
      for (int64_t c = 0; c < kChannels; ++c) {
        *to++ = static_cast<uint8_t>((from[c] * from[kChannels] + UINT8_MAX / 2) / UINT8_MAX);
      }
    }
    return rgb;
  }

  JpegErrors errors_{};
  JpegProgress progress_{};
  jpeg_decompress_struct info_{};
};

/// As `JpegErrors`.
struct PngErrors {
  std::jmp_buf leave;
  std::array<char, 256> message;
};

[[noreturn]] void leave_png(png_structp png, png_const_charp message) {
  auto* errors = static_cast<PngErrors*>(png_get_error_ptr(png));
  std::snprintf(errors->message.data(), errors->message.size(), "%s", message);
  std::longjmp(errors->leave, 1);
}

void pass_png_warning(png_structp /*png*/, png_const_charp /*message*/) {}

void read_png_bytes(png_structp png, png_bytep into, size_t count) {
  auto* rest = static_cast<Bytes*>(png_get_io_ptr(png));
  if (count > rest->size()) {
    png_error(png, "ends too early");
  }
  std::memcpy(into, rest->data(), count);
  *rest = rest->subspan(count);
}

/// Owns libpng's state, as `JpegReader` does. Values are taken as they are stored, whatever gamma or profile the file
/// names.
class PngReader {
 public:
  explicit PngReader(const std::vector<uint8_t>& bytes) : PngReader() {
    bytes_ = bytes;
    rest_ = bytes;
    run([&] {
      png_set_read_fn(png_, &rest_, read_png_bytes);
      // Texts, profiles, EXIF: libpng would take as much memory for one as its header names, and nothing of them is
      // needed from it.
      png_set_keep_unknown_chunks(png_, PNG_HANDLE_CHUNK_NEVER, nullptr, -1);
      png_read_info(png_, info_);
    });
  }
  ~PngReader() { png_destroy_read_struct(&png_, &info_, nullptr); }
  PngReader(const PngReader&) = delete;
  PngReader& operator=(const PngReader&) = delete;

  int64_t height() const { return png_get_image_height(png_, info_); }
  int64_t width() const { return png_get_image_width(png_, info_); }

  /// Of the EXIF data, which may stand behind the pixels, where libpng has not been yet.
  int orientation() const {
    constexpr size_t kAroundChunk = 12;  // length, type, checksum
    for (Bytes rest = bytes_.subspan(kPngStart.size()); rest.size() >= kAroundChunk;) {
      const size_t length = png_get_uint_32(rest.data());
      if (length > rest.size() - kAroundChunk) {
        break;
      }
      if (std::memcmp(rest.data() + 4, "eXIf", 4) == 0) {
        return exif_orientation(rest.subspan(8, length));
      }
      rest = rest.subspan(kAroundChunk + length);
    }
    return exif_orientation({});
  }

  at::Tensor decode() {
    at::Tensor pixels = at::empty({height(), width(), kChannels}, at::kByte);
    std::vector<png_bytep> rows(static_cast<size_t>(height()));
    for (size_t row = 0; row < rows.size(); ++row) {
      rows[row] = pixels.mutable_data_ptr<uint8_t>() + static_cast<int64_t>(row) * pixels.stride(0);
    }
    run([&] {
      png_set_expand(png_);    // palettes, fewer than 8 bits, a transparent colour
      png_set_strip_16(png_);  // to the higher byte
      png_set_strip_alpha(png_);
      png_set_gray_to_rgb(png_);
      png_set_interlace_handling(png_);
      png_read_update_info(png_, info_);
      if (png_get_rowbytes(png_, info_) != static_cast<size_t>(pixels.stride(0))) {
        png_error(png_, "has an unknown format");
      }
      png_read_image(png_, rows.data());
    });
    return pixels;
  }

 private:
  PngReader()
      : png_(png_create_read_struct(PNG_LIBPNG_VER_STRING, &errors_, leave_png, pass_png_warning)),
        info_(png_ != nullptr ? png_create_info_struct(png_) : nullptr) {
    if (info_ == nullptr) {
      png_destroy_read_struct(&png_, nullptr, nullptr);
      throw ImageError("not enough memory");
    }
  }

  template <typename Call>
  void run(const Call& call) {
    if (setjmp(errors_.leave) != 0) {
      throw ImageError(errors_.message.data());
    }
    call();
  }

  PngErrors errors_{};
  Bytes bytes_;
  Bytes rest_;  // what libpng has not read yet
  png_structp png_;
  png_infop info_;
};

}  // namespace

ImageFile::ImageFile(const std::filesystem::path& path, int64_t max_pixels) : bytes_(read_file(path)) {
  const auto take_header = [this, max_pixels](const auto& reader) {
    check_size(reader.height(), reader.width(), max_pixels);
    orientation_ = reader.orientation();
    height_ = turns_by_a_quarter(orientation_) ? reader.width() : reader.height();
    width_ = turns_by_a_quarter(orientation_) ? reader.height() : reader.width();
  };
  if (starts_with(bytes_, kJpegStart)) {
    take_header(JpegReader(bytes_));
  } else if (starts_with(bytes_, kPngStart)) {
    format_ = Format::Png;
    take_header(PngReader(bytes_));
  } else {
    throw ImageError(bytes_.empty() ? "is empty" : "is neither a JPEG nor a PNG file");
  }
}

at::Tensor ImageFile::decode(int shrink) const {
  return upright(format_ == Format::Jpeg ? JpegReader(bytes_).decode(shrink) : PngReader(bytes_).decode(),
                 orientation_);
}

}  // namespace m2teacher
