#include "compare.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

namespace momentum_bn::kernels::test {

double spacing(Type type, double value) {
  struct Format {
    int digits;
    int smallest_exponent;
  };
  const auto format = [type]() -> Format {
    switch (type) {
      case Type::kFloat:
        return {24, -126};
      case Type::kDouble:
        return {53, -1022};
      case Type::kBFloat16:
        return {8, -126};
      default:
        return {11, -14};
    }
  }();
  const int exponent = value == 0 ? format.smallest_exponent : std::max(std::ilogb(value), format.smallest_exponent);
  return std::ldexp(1.0, exponent - format.digits + 1);
}

testing::AssertionResult near(Type type, const std::vector<double>& values, const std::vector<double>& expected,
                              double tolerance) {
  std::vector<double> tolerances(expected.size(), tolerance);
  if (type == Type::kBFloat16 || type == Type::kHalf) {
    std::transform(expected.begin(), expected.end(), tolerances.begin(),
                   [&](double value) { return std::isfinite(value) ? tolerance + spacing(type, value) : tolerance; });
  }
  return each_near(values, expected, tolerances);
}

testing::AssertionResult each_near(const std::vector<double>& values, const std::vector<double>& expected,
                                   const std::vector<double>& tolerances) {
  if (values.size() != expected.size()) {
    return testing::AssertionFailure() << values.size() << " values, expected " << expected.size();
  }
  size_t wrong = 0;
  size_t worst = 0;
  double excess = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const bool same = values[i] == expected[i] || (std::isnan(values[i]) && std::isnan(expected[i]));
    const double error = std::abs(values[i] - expected[i]);
    if (same || error <= tolerances[i]) {
      continue;
    }
    ++wrong;
    const double by = std::isfinite(error) ? error / tolerances[i] : std::numeric_limits<double>::infinity();
    if (by > excess) {
      worst = i;
    }
    excess = std::max(excess, by);
  }
  if (wrong == 0) {
    return testing::AssertionSuccess();
  }
  std::ostringstream text;
  text.precision(17);
  text << wrong << " of " << values.size() << " values are off, most of all [" << worst << "] = " << values[worst]
       << ", expected " << expected[worst] << " within " << tolerances[worst];
  return testing::AssertionFailure() << text.str();
}

double unit_tolerance(Type type) { return type == Type::kDouble ? 1e-12 : 1e-6; }

}  // namespace momentum_bn::kernels::test
