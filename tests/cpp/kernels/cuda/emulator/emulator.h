#pragma once

#include <cstdint>
#include <string>

// What the tests ask of the emulator (cuda_runtime.h) beside running kernels.

namespace momentum_bn::emulator {

/// Blocks of later launches, and the threads of each, take turns in an order drawn from `seed`; 0: in that of their
/// indices. Results must not depend on it.
void set_order(uint64_t seed);

/// From now on the current device is another one, which can launch no clusters of several blocks, or the first again.
void refuse_clusters(bool refuse);

/// The next launch fails with this error.
void fail_next_launch(int error);

/// Kernels launched so far.
int64_t launches();

/// What was wrong with the launches since the last call, or "": barriers that not all threads of a block reached,
/// writes beyond shared memory.
std::string take_errors();

}  // namespace momentum_bn::emulator
