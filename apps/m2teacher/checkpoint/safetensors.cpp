#include "checkpoint/safetensors.h"

#include "error.h"
#include "output/atomic_file.h"

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
    // The library keeps the last of several equal keys; a file that has them is ambiguous.
    std::vector<std::set<std::string>> keys;
    bool repeated = false;
    const auto watch = [&](int /*depth*/, json::parse_event_t event, json& parsed) {
      if (event == json::parse_event_t::object_start) {
        keys.emplace_back();
      } else if (event == json::parse_event_t::object_end) {
        keys.pop_back();
      } else if (event == json::parse_event_t::key) {
        repeated |= !keys.back().insert(parsed.get<std::string>()).second;
      }
      return true;
    };
    const json header = json::parse(text, watch, /*allow_exceptions=*/false);
    if (header.is_discarded() || !header.is_object()) {
      fail("its header is no JSON object");
    }
    if (repeated) {
      fail("its header holds a key twice");
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
    for (const json& size : shape) {
      // Bounded one by one, so that a size of 0 beside a huge one stays a valid shape.
      if (!size.is_number_unsigned() || size.get<uint64_t>() > uint64_t{1} << 40 ||
          __builtin_mul_overflow(bytes, size.get<uint64_t>(), &bytes)) {
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

/// Fails if there is less to read than was asked for.
void read_exactly(std::ifstream& stream, const std::string& file, void* into, uint64_t bytes) {
  stream.read(static_cast<char*>(into), static_cast<std::streamsize>(bytes));
  if (static_cast<uint64_t>(stream.gcount()) != bytes) {
    throw UserError(file + ": cannot be read to its end");
  }
}

}  // namespace

void write_safetensors(const std::filesystem::path& path, const Safetensors& contents) {
  // Widest dtype first, as the format's own library does, so that every tensor is aligned.
  std::vector<std::pair<std::string, at::Tensor>> ordered;
  ordered.reserve(contents.tensors.size());
  for (const auto& [name, tensor] : contents.tensors) {
    ordered.emplace_back(name, tensor.detach().cpu().contiguous());
  }
  std::stable_sort(ordered.begin(), ordered.end(),
                   [](const auto& a, const auto& b) { return a.second.element_size() > b.second.element_size(); });

  json header = json::object();
  if (!contents.metadata.empty()) {
    header[kMetadata] = contents.metadata;
  }
  uint64_t offset = 0;
  for (const auto& [name, tensor] : ordered) {
    const uint64_t end = offset + tensor.nbytes();
    header[name] = {
        {"dtype", dtype_name(tensor.scalar_type())}, {"shape", tensor.sizes().vec()}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text = header.dump();
  text.resize((text.size() + kAlignment - 1) / kAlignment * kAlignment, ' ');

  AtomicFile file(path);
  const uint64_t header_bytes = text.size();
  file.write(&header_bytes, sizeof(header_bytes));
  file.write(text.data(), text.size());
  for (const auto& [name, tensor] : ordered) {
    file.write(tensor.const_data_ptr(), tensor.nbytes());
  }
  file.commit();
}

Safetensors read_safetensors(const std::filesystem::path& path) {
  const std::string file = path.string();
  if (std::filesystem::is_directory(path)) {
    throw UserError(file + ": is a folder, expected a safetensors file");
  }
  errno = 0;
  std::ifstream stream(path, std::ios::binary);
  if (!stream) {
    throw UserError(file + ": cannot be opened: " + std::strerror(errno));
  }
  const uint64_t file_bytes = std::filesystem::file_size(path);
  uint64_t header_bytes = 0;
  if (file_bytes < sizeof(header_bytes)) {
    throw UserError(file + ": not a safetensors file: only " + std::to_string(file_bytes) + " bytes long");
  }
  read_exactly(stream, file, &header_bytes, sizeof(header_bytes));
  if (header_bytes > kMaxHeaderBytes || header_bytes > file_bytes - sizeof(header_bytes)) {
    throw UserError(file + ": not a sound safetensors file: a header of " + std::to_string(header_bytes) +
                    " bytes in a file of " + std::to_string(file_bytes) + ": truncated or damaged");
  }
  std::string text(header_bytes, '\0');
  read_exactly(stream, file, text.data(), header_bytes);

  Safetensors contents;
  const HeaderParser parser(file, file_bytes - sizeof(header_bytes) - header_bytes);
  for (const Entry& entry : parser.parse(text, contents.metadata)) {
    at::Tensor tensor = at::empty(entry.shape, entry.dtype);
    read_exactly(stream, file, tensor.mutable_data_ptr(), entry.end - entry.begin);
    contents.tensors.emplace(entry.name, std::move(tensor));
  }
  return contents;
}

}  // namespace m2teacher
