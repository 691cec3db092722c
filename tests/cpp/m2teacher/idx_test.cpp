#include "data/idx.h"

#include "data/load_dataset.h"
#include "data/mnist_family.h"
#include "expect_regular_file.h"
#include "expect_user_error.h"
#include "temporary_folder.h"

#include <ATen/ops/equal.h>
#include <ATen/ops/tensor.h>

#include <zlib.h>

namespace m2teacher {
namespace {

const std::string kHeader2x3("\0\0\x08\x02\0\0\0\x02\0\0\0\x03", 12);
const std::string kData2x3("\x01\x02\x03\x04\x05\xff", 6);

void write_gzip(const std::filesystem::path& path, const std::string& bytes) {
  gzFile file = gzopen(path.c_str(), "wb");
  ASSERT_EQ(gzwrite(file, bytes.data(), static_cast<unsigned>(bytes.size())), static_cast<int>(bytes.size()));
  gzclose(file);
}

std::string idx(const std::vector<uint8_t>& sizes, const std::string& data) {
  std::string bytes("\0\0\x08", 3);
  bytes += static_cast<char>(sizes.size());
  for (const uint8_t size : sizes) {
    bytes += std::string("\0\0\0", 3) + static_cast<char>(size);
  }
  return bytes + data;
}

TEST(Idx, ReadsPlainAndCompressedFiles) {
  const TemporaryFolder folder;
  const at::Tensor expected = at::tensor({1, 2, 3, 4, 5, 255}, at::kByte).view({2, 3});
  write_bytes(folder / "plain", kHeader2x3 + kData2x3);
  write_gzip(folder / "packed.gz", kHeader2x3 + kData2x3);
  EXPECT_TRUE(at::equal(read_idx(folder / "plain"), expected));
  EXPECT_TRUE(at::equal(read_idx(folder / "packed.gz"), expected));
}

TEST(Idx, RefusesEveryTruncation) {
  const TemporaryFolder folder;
  const std::string whole = kHeader2x3 + kData2x3;
  for (size_t length = 0; length < whole.size(); ++length) {
    write_bytes(folder / "cut", whole.substr(0, length));
    expect_user_error([&] { read_idx(folder / "cut"); }, "truncated");
  }
  write_gzip(folder / "packed.gz", whole);
  const std::string packed = read_bytes(folder / "packed.gz");
  for (size_t length = 0; length < packed.size(); ++length) {
    write_bytes(folder / "cut.gz", packed.substr(0, length));
    expect_user_error([&] { read_idx(folder / "cut.gz"); }, "cut.gz");
  }
}

TEST(Idx, RefusesWhatIsNoIdxFileOfBytes) {
  const TemporaryFolder folder;
  const auto refuse = [&](const std::string& bytes, const std::string& part) {
    write_bytes(folder / "bad", bytes);
    expect_user_error([&] { read_idx(folder / "bad"); }, part);
  };
  refuse("hello, world", "not an IDX file");
  refuse(std::string("\0\0\x0d\x01\0\0\0\x01", 8) + "data", "not an IDX file of unsigned bytes");
  refuse(std::string("\0\0\x08\0", 4), "not an IDX file");
  refuse(std::string("\0\0\x08\x04", 4) + std::string(16, '\xff'), "asks for more than");
  // A size of 0 beside others whose product no number holds.
  refuse(std::string("\0\0\x08\x04\0\0\0\0", 8) + std::string(12, '\xff'), "asks for more than");
  refuse(kHeader2x3 + kData2x3 + "x", "longer than");
  // More than a file of 9 bytes could hold compressed: refused before memory is taken.
  refuse(std::string("\0\0\x08\x01\xff\xff\xff\xff", 8) + "x", "it holds at most");
  expect_user_error([&] { read_idx(folder / "nowhere"); }, "cannot be opened");
  expect_regular_file(folder / "bad", [&] { read_idx(folder / "bad"); });
}

TEST(Idx, NoticesAFlippedByteInACompressedFile) {
  const TemporaryFolder folder;
  write_gzip(folder / "packed.gz", kHeader2x3 + kData2x3);
  std::string packed = read_bytes(folder / "packed.gz");
  packed[packed.size() - 6] ^= 1;  // in the checksum
  write_bytes(folder / "packed.gz", packed);
  expect_user_error([&] { read_idx(folder / "packed.gz"); }, "damaged");
}

class MnistFamily : public testing::Test {
 protected:
  void SetUp() override {
    std::filesystem::create_directory(folder_ / "data");
    write("train-images-idx3-ubyte", idx({3, 2, 2}, std::string(12, 'a')));
    write("train-labels-idx1-ubyte", idx({3}, std::string("\x09\0\x01", 3)));
    write("t10k-images-idx3-ubyte", idx({1, 2, 2}, std::string(4, 'b')));
    write("t10k-labels-idx1-ubyte", idx({1}, std::string("\x02", 1)));
  }
  void write(const std::string& name, const std::string& bytes) { write_bytes(folder_ / "data" / name, bytes); }
  Dataset load() const { return load_mnist_family(folder_ / "data"); }

  TemporaryFolder folder_;
};

TEST_F(MnistFamily, LoadsImagesWithTheirLabels) {
  write("train-labels-idx1-ubyte", idx({3}, std::string("\xff\0\x01", 3)));
  EXPECT_EQ(load().classes(), 256);
  write("train-labels-idx1-ubyte", idx({3}, std::string("\x09\0\x01", 3)));
  const Dataset dataset = load();
  EXPECT_EQ(images_in_memory(*dataset.train).sizes(), at::IntArrayRef({3, 1, 2, 2}));
  EXPECT_TRUE(at::equal(dataset.train->labels(), at::tensor({9, 0, 1}, at::kLong)));
  EXPECT_EQ(dataset.test->size(), 1);
  EXPECT_EQ(dataset.classes(), 10);
}

TEST_F(MnistFamily, RefusesFilesThatDoNotFit) {
  write("train-labels-idx1-ubyte", idx({2}, std::string(2, '\0')));
  expect_user_error([&] { load(); }, "2 labels for 3 images");
  write("train-labels-idx1-ubyte", idx({3, 1}, std::string(3, '\0')));
  expect_user_error([&] { load(); }, "expected labels");
  write("train-labels-idx1-ubyte", idx({3}, std::string(3, '\0')));
  write("t10k-images-idx3-ubyte", idx({1, 1, 4}, std::string(4, 'b')));
  expect_user_error([&] { load(); }, "differ in size");
  std::filesystem::remove(folder_ / "data" / "t10k-images-idx3-ubyte");
  expect_user_error([&] { load(); }, "neither t10k-images-idx3-ubyte nor");
  expect_user_error([&] { load_dataset({.spec = {.kind = DataSpec::Kind::Idx, .folder = folder_ / "nowhere"}}); },
                    "no such folder");
}

}  // namespace
}  // namespace m2teacher
