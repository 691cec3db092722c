#include "data/idx.h"

#include "error.h"

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
constexpr size_t kChunkBytes = size_t{1} << 20;

class GzipReader {
 public:
  explicit GzipReader(const std::filesystem::path& path) : path_(path.string()) {
    if (std::filesystem::is_directory(path)) {
      throw UserError(path_ + ": is a folder, expected an IDX file");
    }
    errno = 0;
    file_.reset(gzopen(path_.c_str(), "rb"));
    if (!file_) {
      throw UserError(path_ + ": cannot be opened: " + std::strerror(errno != 0 ? errno : ENOMEM));
    }
    gzbuffer(file_.get(), kChunkBytes);
  }

  /// Reads up to `count` bytes; fewer only at the end of the file.
  size_t read(void* into, size_t count) {
    const int got = gzread(file_.get(), into, static_cast<unsigned>(count));
    int code = Z_OK;
    const char* message = gzerror(file_.get(), &code);
    // A compressed stream that stops early is reported as Z_BUF_ERROR, with the bytes that could be had.
    if (got < 0 || code == Z_BUF_ERROR) {
      const std::string reason = code == Z_ERRNO ? std::strerror(errno) : message;
      throw UserError(path_ + ": truncated or damaged: " + reason);
    }
    return static_cast<size_t>(got);
  }

  const std::string& path() const { return path_; }

 private:
  struct Close {
    void operator()(gzFile file) const { gzclose(file); }
  };
  std::string path_;
  std::unique_ptr<gzFile_s, Close> file_;
};

std::vector<int64_t> read_header(GzipReader& reader) {
  std::array<uint8_t, 4> magic{};
  if (reader.read(magic.data(), magic.size()) != magic.size()) {
    throw UserError(reader.path() + ": truncated: too short for the header of an IDX file");
  }
  if (magic[0] != 0 || magic[1] != 0 || magic[2] != kUnsignedByte || magic[3] < 1 || magic[3] > kMaxDimensions) {
    throw UserError(reader.path() + ": not an IDX file of unsigned bytes (its first four bytes are wrong)");
  }
  std::vector<int64_t> sizes;
  int64_t bytes = 1;
  for (int d = 0; d < magic[3]; ++d) {
    std::array<uint8_t, 4> size{};
    if (reader.read(size.data(), size.size()) != size.size()) {
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
  size_t expected = 1;
  for (const int64_t size : sizes) {
    expected *= static_cast<size_t>(size);
  }

  // Grows with what is really there, so that a garbled header cannot make us reserve gigabytes.
  std::vector<uint8_t> bytes;
  while (bytes.size() < expected) {
    const size_t have = bytes.size();
    const size_t want = std::min(kChunkBytes, expected - have);
    bytes.resize(have + want);
    const size_t got = reader.read(bytes.data() + have, want);
    if (got < want) {
      throw UserError(reader.path() + ": truncated: its header announces " + std::to_string(expected) +
                      " bytes of data, it holds " + std::to_string(have + got));
    }
  }
  // Also makes zlib verify the checksum at the end.
  uint8_t more = 0;
  if (reader.read(&more, 1) != 0) {
    throw UserError(reader.path() + ": longer than the " + std::to_string(expected) +
                    " bytes of data that its header announces");
  }

  at::Tensor tensor = at::empty(sizes, at::kByte);
  std::memcpy(tensor.mutable_data_ptr<uint8_t>(), bytes.data(), bytes.size());
  return tensor;
}

}  // namespace m2teacher
