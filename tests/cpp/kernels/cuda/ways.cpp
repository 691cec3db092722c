#include "ways.h"

#include "buffer.h"

namespace momentum_bn::kernels::cuda::test {

const std::vector<NamedDevice>& forward_ways() {
  static const std::vector<NamedDevice> devices = {
      {"two_launches", small_device(75, 0)},
      {"on_chip", small_device(75, 240)},
      {"in_clusters", small_device(90, 28)},
  };
  return devices;
}

const std::vector<NamedDevice>& backward_ways() {
  static const std::vector<NamedDevice> devices = {{"one_launch", small_device(75, 48)}};
  return devices;
}

std::string name_of_way(const testing::TestParamInfo<std::tuple<Type, NamedDevice>>& info) {
  return kernels::test::name_of(std::get<0>(info.param)) + "_" + std::get<1>(info.param).name;
}

}  // namespace momentum_bn::kernels::cuda::test
