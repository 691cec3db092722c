#include "device/choose_device.h"

#include "error.h"
#include "text/parse_number.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/cuda.h>

#include <dlfcn.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>

namespace m2teacher {
namespace {

constexpr const char* kCuda = "cuda";
constexpr const char* kAllowed = "one of auto, cpu, cuda, cuda:N, meta";

/// The number that is all of the text, if it is one of at least 0.
std::optional<int> whole_number(std::string_view text) {
  const auto number = parse_number<int>(text);
  return number.value_or(-1) >= 0 ? number : std::nullopt;
}

/// The number in "cuda:N". @return none where it is another word
std::optional<int> number_of_gpu(const std::string& word) {
  const std::string prefix = std::string(kCuda) + ':';
  return word.starts_with(prefix) ? whole_number(std::string_view(word).substr(prefix.size())) : std::nullopt;
}

/// GPUs that torch can use. Its part for them is loaded only where there is a driver, as that takes a second.
int gpus() {
  if (!torch::cuda::is_available() && dlopen("libcuda.so.1", RTLD_LAZY) != nullptr) {
    dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL);
  }
  return torch::cuda::is_available() ? static_cast<int>(torch::cuda::device_count()) : 0;
}

int local_rank(const Ranks& ranks) {
  const char* text = std::getenv("LOCAL_RANK");
  if (ranks.alone() || text == nullptr) {
    return 0;
  }
  const std::optional<int> rank = whole_number(text);
  if (!rank) {
    throw UserError("LOCAL_RANK: got '" + std::string(text) + "', expected a whole number of at least 0");
  }
  return *rank;
}

at::Device gpu(const std::string& word, int number) {
  const int found = gpus();
  if (number >= found) {
    throw UserError("--device: got " + word +
                    (word == kCuda && number > 0 ? " for local rank " + std::to_string(number) : "") +
                    ", but torch finds " + (found == 0 ? "no GPU" : std::to_string(found) + " GPUs") + " here");
  }
  const at::Device device(at::kCUDA, static_cast<at::DeviceIndex>(number));
  c10::impl::VirtualGuardImpl(at::kCUDA).setDevice(device);
  return device;
}

/// torch's package for Python brings the kernels that tell shapes; the library alone has but a few of them.
at::Device meta() {
  const auto convolution = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", "");
  if (!convolution.hasKernelForDispatchKey(c10::DispatchKey::Meta)) {
    throw UserError(
        "--device: got meta, which needs torch's package for Python: python -m momentum_bn.m2teacher pretrain --device "
        "meta ...");
  }
  return at::kMeta;
}

}  // namespace

std::string checked_device_word(const std::string& word) {
  if (word != "auto" && word != "cpu" && word != kCuda && word != "meta" && !number_of_gpu(word)) {
    throw UserError("--device: got '" + word + "', expected " + kAllowed);
  }
  return word;
}

at::Device choose_device(const std::string& word, const Ranks& ranks) {
  checked_device_word(word);
  if (word == "meta") {
    return meta();
  }
  const std::optional<int> number = number_of_gpu(word);
  if (number && !ranks.alone()) {
    throw UserError("--device: got " + word + ", expected cuda, as each of the " + std::to_string(ranks.count()) +
                    " processes takes the GPU of its local rank");
  }
  if (word == "cpu" || (word == "auto" && gpus() == 0)) {
    return at::kCPU;
  }
  return gpu(word, number.value_or(local_rank(ranks)));
}

}  // namespace m2teacher
