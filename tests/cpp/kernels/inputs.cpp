#include "inputs.h"

#include <algorithm>
#include <cmath>
#include <sstream>

namespace momentum_bn::kernels::test {
namespace {

/// splitmix64 (Steele, Lea, Flood 2014).
uint64_t next(uint64_t& state) {
  uint64_t z = state += 0x9E3779B97F4A7C15;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

double next_uniform(uint64_t& state) { return static_cast<double>(next(state) >> 11) * 0x1p-53; }

int next_whole(uint64_t& state, int low, int high) {
  return low + static_cast<int>(next(state) % static_cast<uint64_t>(high - low + 1));
}

template <typename Draw>
std::vector<double> draw(int64_t count, Draw one) {
  std::vector<double> values(static_cast<size_t>(count));
  for (double& value : values) {
    value = one();
  }
  return values;
}

}  // namespace

std::string name_of(const Shape& shape) {
  std::ostringstream text;
  text << "[" << shape.outer << "][" << shape.channels << "][" << shape.inner << "]";
  return text.str();
}

const std::vector<Shape>& layouts() {
  static const std::vector<Shape> shapes = {
      {33, 5, 1},   {2, 37, 1},  {6275, 3, 1}, {1571, 64, 1}, {67, 1030, 1}, {33, 37, 4},
      {33, 64, 49}, {2, 5, 255}, {33, 3, 257}, {2, 37, 784},  {2, 3, 3137},  {5, 1, 9001},
  };
  return shapes;
}

const std::vector<Shape>& sizes() {
  static const std::vector<Shape> shapes = [] {
    constexpr int64_t kMostValues = 60'000;
    std::vector<Shape> all;
    for (const int64_t outer : {1, 2, 33}) {
      for (const int64_t channels : {1, 3, 5, 37, 64, 1030}) {
        for (const int64_t inner : {1, 4, 49, 64, 255, 256, 257, 784, 3137}) {
          const Shape shape = {outer, channels, inner};
          if (shape.values() <= kMostValues) {
            all.push_back(shape);
          }
        }
      }
    }
    return all;
  }();
  return shapes;
}

const std::vector<Shape>& shapes_for_threads() {
  static const std::vector<Shape> shapes = {
      {80'003, 1, 1}, {180'001, 3, 1}, {3'001, 64, 1}, {67, 1030, 1}, {1'031, 5, 49}, {2, 1030, 49},  {64, 3, 255},
      {35, 3, 784},   {5, 37, 785},    {3, 64, 256},   {33, 1, 769},  {2, 3, 20'003}, {1, 1, 70'001},
  };
  return shapes;
}

const std::vector<Shape>& shapes_for_exact_sums() {
  static const std::vector<Shape> shapes = {
      {33, 5, 1},  {2, 37, 1},   {131'072, 3, 1}, {4'096, 64, 1}, {64, 1030, 1}, {33, 37, 4},   {64, 64, 49},
      {2, 5, 255}, {33, 3, 257}, {2'048, 5, 64},  {2, 37, 784},   {2, 3, 3'137}, {5, 1, 9'001}, {3, 64, 256},
  };
  return shapes;
}

std::vector<double> unit_noise(int64_t count, uint64_t seed) {
  return draw(count, [state = seed]() mutable {
    double sum = -2;
    for (int i = 0; i < 4; ++i) {
      sum += next_uniform(state);
    }
    return sum * std::sqrt(3.0);
  });
}

std::vector<double> uniform(int64_t count, double low, double high, uint64_t seed) {
  return draw(count, [=, state = seed]() mutable { return low + (high - low) * next_uniform(state); });
}

std::vector<double> whole_numbers(int64_t count, int low, int high, uint64_t seed) {
  return draw(count, [=, state = seed]() mutable { return next_whole(state, low, high); });
}

double exact_mean(int64_t channel) { return static_cast<double>(channel * 5 % 17 - 8); }

std::vector<double> exact_statistics(const Shape& shape, uint64_t seed) {
  std::vector<double> x(static_cast<size_t>(shape.values()));
  const auto at = [&](int64_t outer, int64_t channel, int64_t inner) -> double& {
    return x[static_cast<size_t>((outer * shape.channels + channel) * shape.inner + inner)];
  };
  // A row or a position that is left without a partner holds the mean, unless it is the only one.
  const int64_t row_step = shape.outer > 1 ? 2 : 1;
  const int64_t inner_step = shape.inner > 1 ? 2 : 1;
  uint64_t state = seed;
  for (int64_t outer = 0; outer < shape.outer; outer += row_step) {
    for (int64_t channel = 0; channel < shape.channels; ++channel) {
      for (int64_t inner = 0; inner < shape.inner; inner += inner_step) {
        const bool paired = outer + row_step <= shape.outer && inner + inner_step <= shape.inner;
        const double deviation = paired && row_step * inner_step > 1 ? next_whole(state, -7, 7) : 0;
        for (int64_t row = outer; row < std::min(outer + row_step, shape.outer); ++row) {
          for (int64_t i = inner; i < std::min(inner + inner_step, shape.inner); ++i) {
            at(row, channel, i) = exact_mean(channel) + ((row + i - outer - inner) % 2 == 0 ? deviation : -deviation);
          }
        }
      }
    }
  }
  return x;
}

}  // namespace momentum_bn::kernels::test
