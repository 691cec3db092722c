#include "checkpoint/safetensors.h"

#include "checkpoint/checksum.h"
#include "error.h"
#include "output/atomic_file.h"
#include "regular_file.h"

#include <ATen/ops/empty.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <set>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

namespace m2teacher {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is little-endian");

using nlohmann::json;

constexpr const char* kMetadata = "__metadata__";
constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the format's own library
constexpr size_t kAlignment = 8;
constexpr size_t kMaxDimensions = 64;

struct Dtype {
  const char* name;
  at::ScalarType type;
};

constexpr std::array<Dtype, 10> kDtypes = {{{"F64", at::kDouble},
                                            {"F32", at::kFloat},
                                            {"F16", at::kHalf},
                                            {"BF16", at::kBFloat16},
                                            {"I64", at::kLong},
                                            {"I32", at::kInt},
                                            {"I16", at::kShort},
                                            {"I8", at::kChar},
                                            {"U8", at::kByte},
                                            {"BOOL", at::kBool}}};

std::string dtype_name(at::ScalarType dtype) {
  for (const Dtype& known : kDtypes) {
    if (known.type == dtype) {
      return known.name;
    }
  }
  throw std::invalid_argument(std::string("safetensors knows no dtype ") + at::toString(dtype));
}

struct Entry {
  std::string name;
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  uint64_t begin;
  uint64_t end;
};

/// Looks at a header before memory is taken for what it holds. nlohmann's own filter of events takes time that grows
/// with the square of a list's length.
struct HeaderCheck : nlohmann::json_sax<json> {
  std::string complaint;  ///< empty: none

  bool null() override { return true; }
  bool boolean(bool /*value*/) override { return true; }
  bool number_integer(number_integer_t /*value*/) override { return true; }
  bool number_unsigned(number_unsigned_t /*value*/) override { return true; }
  bool number_float(number_float_t /*value*/, const string_t& /*text*/) override { return true; }
  bool string(string_t& /*value*/) override { return true; }
  bool binary(binary_t& /*value*/) override { return true; }
  bool start_object(std::size_t /*elements*/) override {
    // The format has lists of numbers in objects in an object.
    constexpr size_t kMostObjects = 2;
    if (lists_ > 0 || keys_.size() == kMostObjects) {
      complaint = "its header nests more than the format does";
    }
    keys_.emplace_back();
    return complaint.empty();
  }
  bool end_object() override {
    keys_.pop_back();
    return true;
  }
  /// The library keeps the last of several equal keys; a file that has them is ambiguous.
  bool key(string_t& value) override {
    if (!keys_.back().insert(value).second) {
      complaint = "its header holds a key twice";
    }
    return complaint.empty();
  }
  bool start_array(std::size_t /*elements*/) override {
    if (keys_.empty()) {
      complaint = "its header is no JSON object";
    } else if (lists_ > 0) {
      complaint = "its header nests more than the format does";
    }
    ++lists_;
    return complaint.empty();
  }
  bool end_array() override {
    --lists_;
    return true;
  }
  bool parse_error(std::size_t /*place*/, const std::string& /*token*/, const json::exception& /*error*/) override {
    return false;
  }

 private:
  // Ordered, as a stranger can choose keys that all have the same hash.
  std::vector<std::set<std::string>> keys_;  ///< of the objects that are open
  int lists_ = 0;
};

/// Reads a header, naming in every complaint the file and the tensor.
class HeaderParser {
 public:
  HeaderParser(std::string file, uint64_t data_bytes) : file_(std::move(file)), data_bytes_(data_bytes) {}

  /// Entries in the order of their data, which they cover without gap or overlap.
  std::vector<Entry> parse(const std::string& text, std::map<std::string, std::string>& metadata) const {
    const json header = parse_json(text);
    std::vector<Entry> entries;
    for (const auto& [name, value] : header.items()) {
      if (name == kMetadata) {
        metadata = parse_metadata(value);
      } else {
        entries.push_back(parse_entry(name, value));
      }
    }
    std::sort(entries.begin(), entries.end(),
              [](const Entry& a, const Entry& b) { return std::pair(a.begin, a.end) < std::pair(b.begin, b.end); });
    check_coverage(entries);
    return entries;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw UserError(file_ + ": not a sound safetensors file: " + what);
  }

  json parse_json(const std::string& text) const {
    HeaderCheck check;
    const bool complete = json::sax_parse(text, &check);
    if (!check.complaint.empty()) {
      fail(check.complaint);
    }
    json header = complete ? json::parse(text, nullptr, /*allow_exceptions=*/false) : json();
    if (!header.is_object()) {
      fail("its header is no JSON object");
    }
    return header;
  }

  std::map<std::string, std::string> parse_metadata(const json& value) const {
    std::map<std::string, std::string> metadata;
    if (!value.is_object()) {
      fail("its metadata are no JSON object");
    }
    for (const auto& [key, text] : value.items()) {
      if (!text.is_string()) {
        fail("its metadata hold something other than text under '" + key + "'");
      }
      metadata[key] = text.get<std::string>();
    }
    return metadata;
  }

  Entry parse_entry(const std::string& name, const json& value) const {
    const std::string tensor = "tensor '" + name + "' ";
    if (!value.is_object() || value.size() != 3 || !value.contains("dtype") || !value.contains("shape") ||
        !value.contains("data_offsets")) {
      fail(tensor + "needs dtype, shape and data_offsets");
    }
    Entry entry{.name = name, .dtype = parse_dtype(tensor, value["dtype"]), .shape = {}, .begin = 0, .end = 0};
    uint64_t bytes = at::elementSize(entry.dtype);
    const json& shape = value["shape"];
    if (!shape.is_array() || shape.size() > kMaxDimensions) {
      fail(tensor + "has no valid shape");
    }
    int64_t stride = 1;  // of sizes of 0, too, the tensor's strides are made
    for (const json& size : shape) {
      // Bounded one by one, so that a size of 0 beside a huge one stays a valid shape.
      if (!size.is_number_unsigned() || size.get<uint64_t>() > uint64_t{1} << 40 ||
          __builtin_mul_overflow(bytes, size.get<uint64_t>(), &bytes) ||
          __builtin_mul_overflow(stride, std::max<int64_t>(size.get<int64_t>(), 1), &stride)) {
        fail(tensor + "has no valid shape");
      }
      entry.shape.push_back(size.get<int64_t>());
    }
    const json& offsets = value["data_offsets"];
    if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
        !offsets[1].is_number_unsigned()) {
      fail(tensor + "has no valid data_offsets");
    }
    entry.begin = offsets[0].get<uint64_t>();
    entry.end = offsets[1].get<uint64_t>();
    if (entry.begin > entry.end || entry.end > data_bytes_) {
      fail(tensor + "lies outside the data (" + std::to_string(entry.begin) + " to " + std::to_string(entry.end) +
           " of " + std::to_string(data_bytes_) + " bytes): truncated or damaged");
    }
    if (entry.end - entry.begin != bytes) {
      fail(tensor + "takes " + std::to_string(entry.end - entry.begin) + " bytes, its shape asks for " +
           std::to_string(bytes));
    }
    return entry;
  }

  at::ScalarType parse_dtype(const std::string& tensor, const json& value) const {
    if (value.is_string()) {
      for (const Dtype& known : kDtypes) {
        if (known.name == value.get<std::string>()) {
          return known.type;
        }
      }
    }
    fail(tensor + "has an unknown dtype");
  }

  void check_coverage(const std::vector<Entry>& entries) const {
    uint64_t covered = 0;
    for (const Entry& entry : entries) {
      if (entry.begin != covered) {
        fail("tensor '" + entry.name + "' " + (entry.begin < covered ? "overlaps another" : "leaves a gap before it"));
      }
      covered = entry.end;
    }
    if (covered != data_bytes_) {
      fail("its tensors describe " + std::to_string(covered) + " of " + std::to_string(data_bytes_) + " bytes of data");
    }
  }

  std::string file_;
  uint64_t data_bytes_;
};

/// A file that is read from its beginning to its end.
class Reader {
 public:
  explicit Reader(const std::filesystem::path& path) : file_(path.string()) {
    refuse_irregular(path);
    errno = 0;
    stream_.open(path, std::ios::binary);
    if (!stream_) {
      throw ReadError(file_ + ": cannot be opened: " + std::strerror(errno));
    }
    size_ = std::filesystem::file_size(path);
  }

  const std::string& file() const { return file_; }
  uint64_t size() const { return size_; }

  /// Up to `bytes` bytes; fewer only at the end of the file.
  size_t read(void* into, size_t bytes) {
    errno = 0;
    stream_.read(static_cast<char*>(into), static_cast<std::streamsize>(bytes));
    if (stream_.bad()) {
      throw ReadError(file_ + ": cannot be read: " + std::strerror(errno != 0 ? errno : EIO));
    }
    return static_cast<size_t>(stream_.gcount());
  }

  void read_exactly(void* into, uint64_t bytes) {
    if (read(into, bytes) != bytes) {
      throw UserError(file_ + ": cannot be read to its end");
    }
  }

  void rewind() {
    stream_.clear();
    stream_.seekg(0);
  }

 private:
  std::string file_;
  std::ifstream stream_;
  uint64_t size_ = 0;
};

// A checksum stands at a fixed place, so that it can be verified before anything of the file is interpreted: behind the
// length of the header and these characters, with which the header begins.
constexpr std::string_view kChecksumPrefix = R"({"__metadata__":{"checksum":"xxh3-128:)";
constexpr const char* kChecksumKey = "checksum";
constexpr const char* kChecksumKind = "xxh3-128:";
constexpr size_t kChecksumPlace = sizeof(uint64_t) + kChecksumPrefix.size();
constexpr size_t kChunkBytes = size_t{1} << 16;

std::string blank_checksum() { return std::string(Checksum::kDigits, '0'); }

/// @throws UserError  not the bytes that were written
void verify_checksum(Reader& reader) {
  const auto damaged = [&](const std::string& why) { throw UserError(reader.file() + ": " + why); };
  std::string start(kChecksumPlace + Checksum::kDigits, '\0');
  start.resize(reader.read(start.data(), start.size()));
  if (start.size() < kChecksumPlace + Checksum::kDigits ||
      start.compare(sizeof(uint64_t), kChecksumPrefix.size(), kChecksumPrefix) != 0) {
    damaged("holds no checksum where m2teacher writes it: no checkpoint, or truncated or damaged");
  }
  const std::string expected = start.substr(kChecksumPlace);
  Checksum found;
  found.update(start.data(), kChecksumPlace);
  found.update(blank_checksum().data(), Checksum::kDigits);
  std::vector<char> chunk(kChunkBytes);
  for (size_t bytes = chunk.size(); bytes == chunk.size();) {
    bytes = reader.read(chunk.data(), chunk.size());
    found.update(chunk.data(), bytes);
  }
  if (found.digits() != expected) {
    damaged("truncated or damaged: its checksum is " + found.digits() + ", it was written with " + expected);
  }
  reader.rewind();
}

/// The contents of a file in the order in which they are written.
struct Layout {
  std::string header;  ///< behind its length, padded
  std::vector<at::Tensor> tensors;
};

/// @param checksum  digits of the checksum; empty: none
Layout lay_out(const Safetensors& contents, const std::string& checksum) {
  // Widest dtype first, as the format's own library does, so that every tensor is aligned.
  std::vector<std::pair<std::string, at::Tensor>> ordered;
  ordered.reserve(contents.tensors.size());
  for (const auto& [name, tensor] : contents.tensors) {
    ordered.emplace_back(name, tensor.detach().cpu().contiguous());
  }
  std::stable_sort(ordered.begin(), ordered.end(),
                   [](const auto& a, const auto& b) { return a.second.element_size() > b.second.element_size(); });

  nlohmann::ordered_json metadata = nlohmann::ordered_json::object();
  if (!checksum.empty()) {
    metadata[kChecksumKey] = kChecksumKind + checksum;
  }
  for (const auto& [key, text] : contents.metadata) {
    metadata[key] = text;
  }
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) {
    header[kMetadata] = std::move(metadata);
  }
  Layout layout;
  uint64_t offset = 0;
  for (auto& [name, tensor] : ordered) {
    const uint64_t end = offset + tensor.nbytes();
    header[name] = {
        {"dtype", dtype_name(tensor.scalar_type())}, {"shape", tensor.sizes().vec()}, {"data_offsets", {offset, end}}};
    offset = end;
    layout.tensors.push_back(std::move(tensor));
  }
  layout.header = header.dump();
  layout.header.resize((layout.header.size() + kAlignment - 1) / kAlignment * kAlignment, ' ');
  return layout;
}

/// Hands all bytes of the file to `sink(data, size)`, in their order.
template <typename Sink>
void for_each_piece(const Layout& layout, const Sink& sink) {
  const uint64_t header_bytes = layout.header.size();
  sink(&header_bytes, sizeof(header_bytes));
  sink(layout.header.data(), layout.header.size());
  for (const at::Tensor& tensor : layout.tensors) {
    sink(tensor.const_data_ptr(), tensor.nbytes());
  }
}

void write(const std::filesystem::path& path, const Layout& layout) {
  AtomicFile file(path);
  for_each_piece(layout, [&](const void* data, size_t size) { file.write(data, size); });
  file.commit();
}

Safetensors read(Reader& reader) {
  uint64_t header_bytes = 0;
  if (reader.size() < sizeof(header_bytes)) {
    throw UserError(reader.file() + ": not a safetensors file: only " + std::to_string(reader.size()) + " bytes long");
  }
  reader.read_exactly(&header_bytes, sizeof(header_bytes));
  if (header_bytes > kMaxHeaderBytes || header_bytes > reader.size() - sizeof(header_bytes)) {
    throw UserError(reader.file() + ": not a sound safetensors file: a header of " + std::to_string(header_bytes) +
                    " bytes in a file of " + std::to_string(reader.size()) + ": truncated or damaged");
  }
  std::string text(header_bytes, '\0');
  reader.read_exactly(text.data(), header_bytes);

  Safetensors contents;
  const HeaderParser parser(reader.file(), reader.size() - sizeof(header_bytes) - header_bytes);
  for (const Entry& entry : parser.parse(text, contents.metadata)) {
    at::Tensor tensor = at::empty(entry.shape, entry.dtype);
    reader.read_exactly(tensor.mutable_data_ptr(), entry.end - entry.begin);
    contents.tensors.emplace(entry.name, std::move(tensor));
  }
  return contents;
}

}  // namespace

void write_safetensors(const std::filesystem::path& path, const Safetensors& contents) {
  write(path, lay_out(contents, /*checksum=*/""));
}

void write_checked_safetensors(const std::filesystem::path& path, const Safetensors& contents) {
  Layout layout = lay_out(contents, blank_checksum());
  Checksum checksum;
  for_each_piece(layout, [&](const void* data, size_t size) { checksum.update(data, size); });
  layout.header.replace(kChecksumPrefix.size(), Checksum::kDigits, checksum.digits());
  write(path, layout);
}

Safetensors read_safetensors(const std::filesystem::path& path) {
  Reader reader(path);
  return read(reader);
}

Safetensors read_checked_safetensors(const std::filesystem::path& path) {
  Reader reader(path);
  verify_checksum(reader);
  Safetensors contents = read(reader);
  contents.metadata.erase(kChecksumKey);
  return contents;
}

}  // namespace m2teacher
