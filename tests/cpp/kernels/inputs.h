#pragma once

#include "kernels/cpu/kernels.h"

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace momentum_bn::kernels::test {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

std::string name_of(const Shape& shape);

/// One shape per way through the kernels: long and short planes, none, many channels and few, small and large.
const std::vector<Shape>& layouts();
/// All of N = 1, 2, 33, C = 1, 3, 5, 37, 64, 1030 and planes of 1 to 3137 values that are not too large together.
const std::vector<Shape>& sizes();
/// Large enough to be split among threads, in every way.
const std::vector<Shape>& shapes_for_threads();

/// As layouts(), but where the kernels may split the rows they can do so into parts of even numbers of rows.
const std::vector<Shape>& shapes_for_exact_sums();

/// About normal, variance 1, within +-3.47 (a sum of four uniform numbers).
std::vector<double> unit_noise(int64_t count, uint64_t seed);
/// Uniform in [low, high).
std::vector<double> uniform(int64_t count, double low, double high, uint64_t seed);
/// Whole numbers, uniform in [low, high].
std::vector<double> whole_numbers(int64_t count, int low, int high, uint64_t seed);

/// The mean of each channel of exact_statistics().
double exact_mean(int64_t channel);
/// Whole numbers that are symmetric around the channel's whole mean along rows and along planes, pair by pair: the
/// mean of every even part is that mean, so no order of summation and no choice of shift rounds anything.
std::vector<double> exact_statistics(const Shape& shape, uint64_t seed);

}  // namespace momentum_bn::kernels::test
