#pragma once

#include "data/data_options.h"
#include "data/prefetcher.h"
#include "error.h"
#include "threads.h"

#include <algorithm>
#include <chrono>
#include <optional>
#include <string>
#include <thread>

namespace m2teacher {

/// A loader's options as the prefetcher takes them.
template <typename Batch>
Prefetcher<Batch>::Options prefetch_options(const LoaderOptions& options) {
  const int processors = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  return {.threads = options.threads > 0 ? options.threads : processors,
          .batches_ahead = std::max<int64_t>(1, options.batches_ahead),
          .timeout = std::chrono::duration<double>(options.timeout_seconds)};
}

/// For threads that read images: tensor operations in them start no threads of their own.
inline void use_one_thread() { set_threads_of_this_thread(1); }

/// @throws UserError  nothing came in for too long
template <typename Batch>
std::optional<Batch> next_from(Prefetcher<Batch>& prefetcher) {
  try {
    return prefetcher.next();
  } catch (const PrefetchTimeout& error) {
    throw UserError(std::string("--data: ") + error.what() +
                    ": does the disk or network that holds the images answer?");
  }
}

}  // namespace m2teacher
