#include "data/idx.h"

#include "error.h"
#include "regular_file.h"

#include <ATen/ops/empty.h>

#include <zlib.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace m2teacher {
namespace {

constexpr uint8_t kUnsignedByte = 0x08;
constexpr int kMaxDimensions = 4;
constexpr int64_t kMaxBytes = int64_t{1} << 32;
constexpr int64_t kChunkBytes = int64_t{1} << 20;
constexpr int64_t kMostExpansion = 1032;  // of what gzip compresses

class GzipReader {
 public:
  explicit GzipReader(const std::filesystem::path& path) : path_(path.string()) {
    refuse_irregular(path);
    errno = 0;
    file_.reset(gzopen(path_.c_str(), "rb"));
    if (!file_) {
      throw UserError(path_ + ": cannot be opened: " + std::strerror(errno != 0 ? errno : ENOMEM));
    }
    gzbuffer(file_.get(), kChunkBytes);
    size_ = static_cast<int64_t>(std::filesystem::file_size(path));
  }

  /// Reads up to `count` bytes; fewer only at the end of the file.
  int64_t read(void* into, int64_t count) {
    const int got = gzread(file_.get(), into, static_cast<unsigned>(count));
    int code = Z_OK;
    const char* message = gzerror(file_.get(), &code);
    // A compressed stream that stops early is reported as Z_BUF_ERROR, with the bytes that could be had.
    if (code == Z_ERRNO) {
      throw UserError(path_ + ": cannot be read: " + std::strerror(errno));
    }
    if (got < 0 || code == Z_BUF_ERROR) {
      throw UserError(path_ + ": truncated or damaged: " + message);
    }
    return got;
  }

  const std::string& path() const { return path_; }
  /// Of the file, compressed or not.
  int64_t size() const { return size_; }

 private:
  struct Close {
    void operator()(gzFile file) const { gzclose(file); }
  };
  std::string path_;
  std::unique_ptr<gzFile_s, Close> file_;
  int64_t size_ = 0;
};

std::vector<int64_t> read_header(GzipReader& reader) {
  std::array<uint8_t, 4> magic{};
  if (reader.read(magic.data(), magic.size()) != std::ssize(magic)) {
    throw UserError(reader.path() + ": truncated: too short for the header of an IDX file");
  }
  if (magic[0] != 0 || magic[1] != 0 || magic[2] != kUnsignedByte || magic[3] < 1 || magic[3] > kMaxDimensions) {
    throw UserError(reader.path() + ": not an IDX file of unsigned bytes (its first four bytes are wrong)");
  }
  std::vector<int64_t> sizes;
  int64_t bytes = 1;
  for (int d = 0; d < magic[3]; ++d) {
    std::array<uint8_t, 4> size{};
    if (reader.read(size.data(), size.size()) != std::ssize(size)) {
      throw UserError(reader.path() + ": truncated: too short for the header of an IDX file");
    }
    sizes.push_back(int64_t{size[0]} << 24 | int64_t{size[1]} << 16 | int64_t{size[2]} << 8 | int64_t{size[3]});
    // A size of 0 does not excuse the others: strides are made of them.
    if (__builtin_mul_overflow(bytes, std::max<int64_t>(sizes.back(), 1), &bytes) || bytes > kMaxBytes) {
      throw UserError(reader.path() + ": its header asks for more than " + std::to_string(kMaxBytes) + " bytes");
    }
  }
  return sizes;
}

}  // namespace

at::Tensor read_idx(const std::filesystem::path& path) {
  GzipReader reader(path);
  const std::vector<int64_t> sizes = read_header(reader);
  int64_t expected = 1;
  for (const int64_t size : sizes) {
    expected *= size;
  }
  const auto truncated = [&](const std::string& holds) {
    throw UserError(reader.path() + ": truncated: its header announces " + std::to_string(expected) +
                    " bytes of data, it holds " + holds);
  };
  // A garbled header must not make us reserve gigabytes.
  const int64_t most = reader.size() * kMostExpansion;
  if (expected > most) {
    truncated("at most " + std::to_string(most));
  }
  at::Tensor tensor = at::empty(sizes, at::kByte);
  for (int64_t have = 0; have < expected;) {
    const int64_t want = std::min(kChunkBytes, expected - have);
    const int64_t got = reader.read(tensor.mutable_data_ptr<uint8_t>() + have, want);
    have += got;
    if (got < want) {
      truncated(std::to_string(have));
    }
  }
  // Also makes zlib verify the checksum at the end.
  uint8_t more = 0;
  if (reader.read(&more, 1) != 0) {
    throw UserError(reader.path() + ": longer than the " + std::to_string(expected) +
                    " bytes of data that its header announces");
  }
  return tensor;
}

}  // namespace m2teacher
