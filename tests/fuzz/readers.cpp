// What reads strangers' files, one file after the other: under libFuzzer, which makes them up, or with replay.cpp,
// which takes them from folders. READER in the environment names the reader.

#include "checkpoint/checkpoint.h"
#include "checkpoint/checksum.h"
#include "checkpoint/safetensors.h"
#include "data/cifar10.h"
#include "data/decode_image.h"
#include "data/idx.h"
#include "error.h"
#include "settings/run_settings.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <map>
#include <span>
#include <string>
#include <string_view>

namespace m2teacher {
namespace {

namespace fs = std::filesystem;

using Bytes = std::span<const uint8_t>;

/// A file in memory, whose contents change.
class MemoryFile {
 public:
  MemoryFile()
      : descriptor_(memfd_create("input", MFD_CLOEXEC)), path_("/proc/self/fd/" + std::to_string(descriptor_)) {}

  const fs::path& path() const { return path_; }

  const fs::path& hold(Bytes bytes) const {
    if (ftruncate(descriptor_, 0) != 0 ||
        pwrite(descriptor_, bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
      std::abort();
    }
    return path_;
  }

 private:
  int descriptor_;
  fs::path path_;
};

const MemoryFile& memory_file() {
  static const MemoryFile file;
  return file;
}

void read_idx_file(Bytes bytes) { read_idx(memory_file().hold(bytes)); }

void read_cifar10(Bytes bytes) {
  static const fs::path folder = [] {
    std::string name = fs::temp_directory_path() / "fuzz-cifar10-XXXXXX";
    if (mkdtemp(name.data()) == nullptr) {
      std::abort();
    }
    for (const char* file : {"data_batch_1.bin", "test_batch.bin", "batches.meta.txt"}) {
      fs::create_symlink(memory_file().path(), fs::path(name) / file);
    }
    std::atexit([] { fs::remove_all(folder); });
    return fs::path(name);
  }();
  memory_file().hold(bytes);
  load_cifar10(folder);
}

void read_image(Bytes bytes) {
  constexpr int64_t kMostPixels = 1 << 18;  // more take time without showing anything else
  const ImageFile image(memory_file().hold(bytes));
  if (image.height() * image.width() <= kMostPixels) {
    image.decode(/*shrink=*/1);
    image.decode(/*shrink=*/2);
  }
}

/// As plain safetensors, and as a checkpoint with the checksum that it should have.
void read_tensors(Bytes bytes) {
  constexpr std::string_view kStart = R"({"__metadata__":{"checksum":"xxh3-128:)";
  constexpr size_t kPlace = sizeof(uint64_t) + kStart.size();
  std::string file(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  if (file.size() >= kPlace + Checksum::kDigits && file.compare(sizeof(uint64_t), kStart.size(), kStart) == 0) {
    file.replace(kPlace, Checksum::kDigits, Checksum::kDigits, '0');
    Checksum checksum;
    checksum.update(file.data(), file.size());
    file.replace(kPlace, Checksum::kDigits, checksum.digits());
    read_checkpoint(memory_file().hold({reinterpret_cast<const uint8_t*>(file.data()), file.size()}));
  } else {
    read_safetensors(memory_file().hold(bytes));
  }
}

void read_settings(Bytes bytes) {
  const RunSettings settings = read_config(memory_file().hold(bytes));
  parse_toml(to_toml(settings), "what was written");
}

using Read = void (*)(Bytes bytes);

Read chosen_reader() {
  static const std::map<std::string_view, Read> readers = {{"idx", read_idx_file},        {"cifar10", read_cifar10},
                                                           {"jpeg", read_image},          {"png", read_image},
                                                           {"safetensors", read_tensors}, {"toml", read_settings}};
  const char* name = std::getenv("READER");
  const auto found = readers.find(name != nullptr ? name : "");
  if (found == readers.end()) {
    std::cerr << "READER: expected idx, cifar10, jpeg, png, safetensors or toml\n";
    std::exit(2);
  }
  return found->second;
}

}  // namespace
}  // namespace m2teacher

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const m2teacher::Read read = m2teacher::chosen_reader();
  // Whatever else is thrown is a fault.
  try {
    read({data, size});
  } catch (const m2teacher::UserError&) {
  } catch (const m2teacher::ImageError&) {
  }
  return 0;
}
