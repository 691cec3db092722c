#include "checkpoint/safetensors.h"

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
  EXPECT_PRED2(contains, read_bytes(folder / "file"), R"("b":{"data_offsets":[0,4])");
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

  std::string huge = file_bytes("{}", "");
  huge[7] = '\x7f';
  write_bytes(folder / "huge", huge);
  expect_user_error([&] { read_safetensors(folder / "huge"); }, "truncated or damaged");
  expect_user_error([&] { read_safetensors(folder / "nowhere"); }, "cannot be opened");
  expect_user_error([&] { read_safetensors(folder / ""); }, "is a folder");
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
