#include "checkpoint/safetensors.h"

#include "checkpoint/checksum.h"
#include "expect_regular_file.h"
#include "expect_user_error.h"
#include "temporary_folder.h"

#include <ATen/ATen.h>

#include <cstring>

namespace m2teacher {
namespace {

std::string file_bytes(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  std::string bytes(sizeof(length), '\0');
  std::memcpy(bytes.data(), &length, sizeof(length));
  return bytes + header + data;
}

TEST(Safetensors, RoundTripKeepsEveryDtypeShapeAndBit) {
  const TemporaryFolder folder;
  Safetensors written;
  written.metadata = {{"format", "test"}, {"words", "\"quoted\" \\ and \u00fc"}};
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt, at::kShort,
                                     at::kChar, at::kByte, at::kBool}) {
    written.tensors[std::string("cube.") + at::toString(dtype)] = at::randn({2, 3, 5}).mul(9).to(dtype);
    written.tensors[std::string("scalar.") + at::toString(dtype)] = at::ones({}, dtype);
  }
  written.tensors["empty"] = at::empty({0, 4});
  written.tensors["nan"] = at::full({3}, std::nan(""));
  written.tensors["strided"] = at::randn({4, 6}).t();
  write_safetensors(folder / "file", written);

  const Safetensors read = read_safetensors(folder / "file");
  EXPECT_EQ(read.metadata, written.metadata);
  ASSERT_EQ(read.tensors.size(), written.tensors.size());
  for (const auto& [name, tensor] : written.tensors) {
    const at::Tensor& back = read.tensors.at(name);
    EXPECT_EQ(back.scalar_type(), tensor.scalar_type()) << name;
    EXPECT_EQ(back.sizes(), tensor.sizes()) << name;
    const at::Tensor packed = tensor.contiguous();
    EXPECT_EQ(std::memcmp(back.const_data_ptr(), packed.const_data_ptr(), packed.nbytes()), 0) << name;
  }
}

TEST(Safetensors, AlignsTheData) {
  const TemporaryFolder folder;
  write_safetensors(folder / "file",
                    {.metadata = {}, .tensors = {{"a", at::ones({3}, at::kByte)}, {"b", at::ones(1)}}});
  uint64_t header = 0;
  std::memcpy(&header, read_bytes(folder / "file").data(), sizeof(header));
  EXPECT_EQ(header % 8, 0);
  EXPECT_PRED2(contains, read_bytes(folder / "file"), R"("b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]})");
}

TEST(Safetensors, RefusesEveryTruncationAndWhatIsTooLong) {
  const TemporaryFolder folder;
  write_safetensors(folder / "file", {.metadata = {{"k", "v"}}, .tensors = {{"a", at::randn({2, 2})}}});
  const std::string whole = read_bytes(folder / "file");
  for (size_t length = 0; length < whole.size(); ++length) {
    write_bytes(folder / "cut", whole.substr(0, length));
    expect_user_error([&] { read_safetensors(folder / "cut"); }, "cut");
  }
  write_bytes(folder / "long", whole + "x");
  expect_user_error([&] { read_safetensors(folder / "long"); }, "describe 16 of 17 bytes");
}

TEST(Safetensors, RefusesEveryDamageToTheHeader) {
  const TemporaryFolder folder;
  const auto refuse = [&](const std::string& header, const std::string& part) {
    write_bytes(folder / "bad", file_bytes(header, std::string(8, 'd')));
    expect_user_error([&] { read_safetensors(folder / "bad"); }, part);
  };
  const auto entry = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return R"({"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
  };
  const auto single = [&](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return R"({"a":)" + entry(dtype, shape, offsets) + "}";
  };
  write_bytes(folder / "good", file_bytes(single(R"("F32")", "[2]", "[0,8]"), std::string(8, 'd')));
  EXPECT_NO_THROW(read_safetensors(folder / "good"));

  refuse("{", "no JSON object");
  refuse("[]", "no JSON object");
  refuse("\xff\xfe", "no JSON object");
  refuse(std::string(50'000, '['), "no JSON object");
  refuse("{}", "describe 0 of 8 bytes");
  refuse(R"({"a":3})", "tensor 'a' needs");
  refuse(R"({"a":{"dtype":"F32","shape":[2]}})", "tensor 'a' needs");
  refuse(R"({"__metadata__":3})", "metadata");
  refuse(R"({"__metadata__":{"k":3}})", "metadata");
  refuse(single(R"("F33")", "[2]", "[0,8]"), "unknown dtype");
  refuse(single("32", "[2]", "[0,8]"), "unknown dtype");
  refuse(single(R"("F32")", "[-2]", "[0,8]"), "no valid shape");
  refuse(single(R"("F32")", "[2.0]", "[0,8]"), "no valid shape");
  refuse(single(R"("F32")", "2", "[0,8]"), "no valid shape");
  refuse(single(R"("F32")", "[4294967296,4294967296]", "[0,8]"), "no valid shape");
  refuse(single(R"("F32")", "[18446744073709551615,0]", "[0,8]"), "no valid shape");
  refuse(single(R"("F32")", "[3]", "[0,8]"), "takes 8 bytes, its shape asks for 12");
  refuse(single(R"("F32")", "[2]", "[8,0]"), "outside the data");
  refuse(single(R"("F32")", "[3]", "[0,12]"), "outside the data");
  refuse(single(R"("F32")", "[2]", "[-8,0]"), "data_offsets");
  refuse(single(R"("F32")", "[2]", "[0,8,8]"), "data_offsets");
  refuse(single(R"("F32")", "[1]", "[4,8]"), "leaves a gap");
  refuse(single(R"("F32")", "[1]", "[0,4]"), "describe 4 of 8 bytes");
  const std::string whole = entry(R"("F32")", "[2]", "[0,8]");
  refuse(R"({"a":)" + whole + R"(,"b":)" + entry(R"("F32")", "[1]", "[4,8]") + "}", "overlaps");
  refuse(R"({"a":)" + whole + R"(,"a":)" + whole + "}", "a key twice");
  refuse(R"({"a":{"shape":[],"shape":[]}})", "a key twice");
  // What would take memory or time that the file does not show.
  refuse(single(R"("F32")", "[0,1099511627776,1099511627776]", "[0,0]"), "no valid shape");
  refuse(R"({"a":{"b":{"c":3}}})", "nests more than the format does");
  refuse(R"({"a":[[]]})", "nests more than the format does");
  std::string objects = "{}";
  for (int i = 0; i < 200'000; ++i) {
    objects += ",{}";
  }
  refuse(R"({"a":[)" + objects + "]}", "nests more than the format does");

  std::string huge = file_bytes("{}", "");
  huge[7] = '\x7f';
  write_bytes(folder / "huge", huge);
  expect_user_error([&] { read_safetensors(folder / "huge"); }, "truncated or damaged");
  expect_user_error([&] { read_safetensors(folder / "nowhere"); }, "cannot be opened");
  expect_regular_file(folder / "irregular", [&] { read_safetensors(folder / "irregular"); });
}

TEST(CheckedSafetensors, RoundTrip) {
  const TemporaryFolder folder;
  const Safetensors written = {.metadata = {{"format", "test"}},
                               .tensors = {{"Upper", at::randn({3})}, {"a", at::randn({2, 2}).t()}}};
  write_checked_safetensors(folder / "file", written);
  const Safetensors read = read_checked_safetensors(folder / "file");
  EXPECT_EQ(read.metadata, written.metadata);
  EXPECT_TRUE(at::equal(read.tensors.at("a"), written.tensors.at("a")));
  EXPECT_TRUE(at::equal(read.tensors.at("Upper"), written.tensors.at("Upper")));
  // For everybody else a safetensors file like any other.
  EXPECT_EQ(read_safetensors(folder / "file").metadata.at("checksum").size(), std::strlen("xxh3-128:") + 32);
  write_safetensors(folder / "unchecked", written);
  expect_user_error([&] { read_checked_safetensors(folder / "unchecked"); }, "holds no checksum");
}

TEST(CheckedSafetensors, NoticesEveryFlippedOrMissingBit) {
  const TemporaryFolder folder;
  write_checked_safetensors(folder / "file", {.metadata = {{"k", "v"}}, .tensors = {{"a", at::randn({2, 2})}}});
  const std::string whole = read_bytes(folder / "file");
  ASSERT_NO_THROW(read_checked_safetensors(folder / "file"));
  const auto refuse = [&](const std::string& bytes) {
    write_bytes(folder / "bad", bytes);
    expect_user_error([&] { read_checked_safetensors(folder / "bad"); }, "truncated or damaged");
  };
  for (size_t place = 0; place < whole.size(); ++place) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string flipped = whole;
      flipped[place] = static_cast<char>(flipped[place] ^ (1 << bit));
      refuse(flipped);
    }
    refuse(whole.substr(0, place));
    refuse(whole.substr(0, place) + whole.substr(place + 1));
  }
  refuse(whole + '\0');
  refuse(whole + whole);
}

TEST(Checksum, IsXxh3) {
  // Of no bytes: the value that xxHash documents.
  EXPECT_EQ(Checksum().digits(), "99aa06d3014798d86001c324468d497f");
  Checksum pieces;
  pieces.update("ab", 2);
  pieces.update("c", 1);
  Checksum whole;
  whole.update("abc", 3);
  EXPECT_EQ(pieces.digits(), whole.digits());
}

TEST(Safetensors, LeavesNothingBehindWhereItCannotWrite) {
  const TemporaryFolder folder;
  EXPECT_THROW(
      write_safetensors(folder / "file", {.metadata = {}, .tensors = {{"a", at::zeros({2}, at::kComplexFloat)}}}),
      std::invalid_argument);
  EXPECT_EQ(folder.file_count(), 0);
  std::filesystem::create_directory(folder / "taken");
  write_bytes(folder / "taken" / "inside", "");
  expect_user_error([&] { write_safetensors(folder / "taken", {.metadata = {}, .tensors = {{"a", at::ones(1)}}}); },
                    "cannot be written");
  EXPECT_EQ(folder.file_count(), 1);
}

}  // namespace
}  // namespace m2teacher
