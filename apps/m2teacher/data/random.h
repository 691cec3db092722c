#pragma once

#include <ATen/core/PhiloxRNGEngine.h>

#include <cmath>
#include <cstdint>

namespace m2teacher {

/// What random numbers are for: numbers for one purpose tell nothing of those for another.
enum class Purpose : uint64_t { Shuffle = 1, Crop = 2, Colour = 3, Evaluation = 4 };

/// A seed that is a function of the run's seed, the purpose, and a number such as that of an epoch or a batch
/// (mixed as in SplitMix64, Steele, Lea and Flood 2014).
inline uint64_t derived_seed(uint64_t seed, Purpose purpose, int64_t number) {
  uint64_t mixed = 0;
  for (const uint64_t part : {seed, static_cast<uint64_t>(purpose), static_cast<uint64_t>(number)}) {
    mixed = (mixed ^ part) + 0x9e3779b97f4a7c15U;
    mixed = (mixed ^ (mixed >> 30U)) * 0xbf58476d1ce4e5b9U;
    mixed = (mixed ^ (mixed >> 27U)) * 0x94d049bb133111ebU;
    mixed ^= mixed >> 31U;
  }
  return mixed;
}

/// Which view of which image random numbers are for.
struct ViewPlace {
  uint64_t seed;  ///< of the run
  int64_t batch;  ///< number of the batch, 0 for the first
  int64_t view;   ///< 0 or 1
  int64_t place;  ///< of the image in the whole batch, whichever process has it
};

/// Random numbers for one view of one image: a function of the purpose and the place alone, so that they can be drawn
/// by any thread of any process, in any order.
class Random {
 public:
  Random(Purpose purpose, const ViewPlace& at)
      : engine_(derived_seed(at.seed, purpose, at.batch), static_cast<uint64_t>(2 * at.place + at.view)) {}

  /// In [0, 1).
  double uniform() { return engine_() * 0x1p-32; }
  double uniform(double low, double high) { return low + (high - low) * uniform(); }
  /// 0 to count - 1.
  int64_t below(int64_t count) { return static_cast<int64_t>(std::floor(uniform() * static_cast<double>(count))); }
  bool chance(double share) { return uniform() < share; }

 private:
  at::Philox4_32 engine_;
};

}  // namespace m2teacher
