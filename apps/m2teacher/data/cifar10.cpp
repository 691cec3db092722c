#include "data/cifar10.h"

#include "error.h"
#include "regular_file.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <string>

namespace m2teacher {
namespace {

constexpr int64_t kCifarSide = 32;
constexpr int64_t kCifarChannels = 3;
constexpr int64_t kRecordBytes = 1 + kCifarChannels * kCifarSide * kCifarSide;
constexpr int64_t kCifarClasses = 10;
constexpr int kCifarBatches = 5;
constexpr int64_t kMostNamesBytes = int64_t{1} << 16;

/// Records of a label and three planes: (N, 3073), uint8.
at::Tensor read_records(const std::filesystem::path& path) {
  refuse_irregular(path);
  std::ifstream stream(path, std::ios::binary | std::ios::ate);
  if (!stream) {
    throw UserError(path.string() + ": cannot be opened: " + std::strerror(errno));
  }
  const auto bytes = static_cast<int64_t>(stream.tellg());
  if (bytes <= 0 || bytes % kRecordBytes != 0) {
    throw UserError(path.string() + ": has " + std::to_string(bytes) + " bytes, expected a multiple of " +
                    std::to_string(kRecordBytes) + " (a label and 3 x 32 x 32 pixels each): truncated or damaged");
  }
  at::Tensor records = at::empty({bytes / kRecordBytes, kRecordBytes}, at::kByte);
  stream.seekg(0);
  if (!stream.read(reinterpret_cast<char*>(records.mutable_data_ptr<uint8_t>()), bytes)) {
    throw UserError(path.string() + ": cannot be read: " + std::strerror(errno));
  }
  const auto largest = records.select(1, 0).max().item<int64_t>();
  if (largest >= kCifarClasses) {
    throw UserError(path.string() + ": holds label " + std::to_string(largest) + ", expected 0 to " +
                    std::to_string(kCifarClasses - 1));
  }
  return records;
}

std::shared_ptr<TensorSource> make_cifar_source(const at::Tensor& records) {
  const at::Tensor images =
      records.narrow(1, 1, kRecordBytes - 1).contiguous().view({-1, kCifarChannels, kCifarSide, kCifarSide});
  return std::make_shared<TensorSource>(images, records.select(1, 0).to(at::kLong));
}

std::vector<std::string> cifar_class_names(const std::filesystem::path& path) {
  refuse_irregular(path);
  std::ifstream stream(path, std::ios::ate);
  const auto bytes = static_cast<int64_t>(stream.tellg());  // -1: there is none
  if (bytes > kMostNamesBytes) {
    throw UserError(path.string() + ": has " + std::to_string(bytes) + " bytes, at most " +
                    std::to_string(kMostNamesBytes) + " are read");
  }
  stream.seekg(0);
  std::vector<std::string> names;
  for (std::string name; std::getline(stream, name) && !name.empty();) {
    names.push_back(name);
  }
  for (auto number = static_cast<int64_t>(names.size()); number < kCifarClasses; ++number) {
    names.push_back(std::to_string(number));
  }
  names.resize(kCifarClasses);
  return names;
}

}  // namespace

Dataset load_cifar10(const std::filesystem::path& folder) {
  std::vector<at::Tensor> batches;
  for (int number = 1; number <= kCifarBatches; ++number) {
    const auto path = folder / ("data_batch_" + std::to_string(number) + ".bin");
    if (std::filesystem::exists(path)) {
      batches.push_back(read_records(path));
    }
  }
  if (batches.empty()) {
    throw UserError(folder.string() + ": has no data_batch_*.bin");
  }
  const auto train = make_cifar_source(at::cat(batches));
  return {.train = train,
          .test = make_cifar_source(read_records(folder / "test_batch.bin")),
          .class_names = cifar_class_names(folder / "batches.meta.txt"),
          .pixels = pixel_statistics(train->in_memory())};
}

}  // namespace m2teacher
