#include "data/cifar10.h"

#include "data/load_dataset.h"
#include "expect_regular_file.h"
#include "expect_user_error.h"
#include "temporary_folder.h"

#include <ATen/ATen.h>

namespace m2teacher {
namespace {

class Cifar10 : public testing::Test {
 protected:
  void SetUp() override {
    write("data_batch_1.bin", record(3, 10) + record(9, 20));
    write("data_batch_2.bin", record(0, 30));
    write("test_batch.bin", record(1, 40));
  }
  /// Red, green and blue planes of one value each: `red`, red + 1, red + 2; the first pixel is 0.
  static std::string record(char label, int red) {
    std::string bytes(1, label);
    for (int channel = 0; channel < 3; ++channel) {
      bytes += '\0' + std::string(1023, static_cast<char>(red + channel));
    }
    return bytes;
  }
  void write(const std::string& name, const std::string& bytes) { write_bytes(folder_ / name, bytes); }
  Dataset load() const { return load_dataset({.spec = {.kind = DataSpec::Kind::Cifar10, .folder = folder_ / ""}}); }

  TemporaryFolder folder_;
};

TEST_F(Cifar10, ReadsPlanesAndLabels) {
  const Dataset dataset = load();
  const at::Tensor images = images_in_memory(*dataset.train);
  ASSERT_EQ(images.sizes(), at::IntArrayRef({3, 3, 32, 32}));
  EXPECT_EQ(images[1][2][31][31].item<int64_t>(), 22);
  EXPECT_EQ(images[1][2][0][0].item<int64_t>(), 0);
  EXPECT_TRUE(at::equal(dataset.train->labels(), at::tensor({3, 9, 0}, at::kLong)));
  EXPECT_EQ(images_in_memory(*dataset.test)[0][0][1][1].item<int64_t>(), 40);
  EXPECT_EQ(dataset.classes(), 10);
  const at::Tensor pixels = images.to(at::kDouble) / 255;
  for (int64_t channel = 0; channel < 3; ++channel) {
    const auto at_channel = static_cast<size_t>(channel);
    EXPECT_NEAR(dataset.pixels.mean.at(at_channel), pixels.select(1, channel).mean().item<double>(), 1e-12);
    EXPECT_NEAR(dataset.pixels.std.at(at_channel), pixels.select(1, channel).std(/*unbiased=*/false).item<double>(),
                1e-12);
  }
  write("batches.meta.txt", "airplane\nautomobile\n\n");
  EXPECT_EQ(load().class_names.at(1), "automobile");
  EXPECT_EQ(load().class_names.at(2), "2");
}

TEST_F(Cifar10, RefusesWhatIsDamagedOrMissing) {
  write("data_batch_2.bin", record(0, 30).substr(1));
  expect_user_error([&] { load(); }, "data_batch_2.bin: has 3072 bytes, expected a multiple of 3073");
  write("data_batch_2.bin", "");
  expect_user_error([&] { load(); }, "data_batch_2.bin: has 0 bytes");
  write("data_batch_2.bin", record(10, 30));
  expect_user_error([&] { load(); }, "data_batch_2.bin: holds label 10, expected 0 to 9");
  expect_regular_file(folder_ / "data_batch_2.bin", [&] { load(); });
  expect_regular_file(folder_ / "batches.meta.txt", [&] { load(); });
  write("batches.meta.txt", std::string((1 << 16) + 1, '\n'));
  expect_user_error([&] { load(); }, "batches.meta.txt: has 65537 bytes, at most 65536 are read");
  std::filesystem::remove(folder_ / "test_batch.bin");
  expect_user_error([&] { load(); }, "test_batch.bin: cannot be opened");
  std::filesystem::remove(folder_ / "data_batch_1.bin");
  expect_user_error([&] { load(); }, "has no data_batch_*.bin");
}

}  // namespace
}  // namespace m2teacher
