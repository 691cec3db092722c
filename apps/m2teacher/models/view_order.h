#pragma once

#include "models/normalisation.h"

#include <atomic>
#include <cstdint>

namespace m2teacher {

/// Which of the two views this thread works on, where two threads work on one each. Normalisation layers change as they
/// are used, so the second view may pass a layer only after the first one.
struct ViewOrder {
  int64_t view = -1;                          ///< 0 or 1; -1: this thread works alone
  uint64_t run = 0;                           ///< another number for every time that the two views go through a network
  const std::atomic<bool>* failed = nullptr;  ///< set where the other thread has ended with an error

  static ViewOrder& of_this_thread();
};

/// Makes the normalisations that `norm` makes, each letting the first view pass before the second.
/// Their forward throws std::runtime_error where the first view's thread failed before it came by.
NormFactory in_view_order(NormFactory norm);

}  // namespace m2teacher
