#pragma once

#include <cstdint>

namespace m2teacher {

/// What random numbers are for: numbers for one purpose tell nothing of those for another.
enum class Purpose : uint64_t { Shuffle = 1, Augment = 2 };

/// A seed that is a function of the run's seed, the purpose, and a number such as an epoch or a step
/// (mixed as in SplitMix64, Steele, Lea and Flood 2014).
inline uint64_t derived_seed(uint64_t seed, Purpose purpose, int64_t number) {
  uint64_t mixed = seed;
  for (const uint64_t part : {static_cast<uint64_t>(purpose), static_cast<uint64_t>(number)}) {
    mixed = (mixed ^ part) + 0x9e3779b97f4a7c15U;
    mixed = (mixed ^ (mixed >> 30U)) * 0xbf58476d1ce4e5b9U;
    mixed = (mixed ^ (mixed >> 27U)) * 0x94d049bb133111ebU;
    mixed ^= mixed >> 31U;
  }
  return mixed;
}

}  // namespace m2teacher
