#pragma once

#include <chrono>
#include <cstdint>
#include <ostream>
#include <string>

namespace m2teacher {

/// Says on a stream how far a training run is: a bar that redraws itself on a terminal, now and then a plain line
/// elsewhere. Shows the running mean of the loss, images per second of the steps and the time left of everything.
class Progress {
 public:
  /// @param terminal  whether the stream is one
  Progress(std::ostream& stream, bool terminal, int64_t total_steps, int64_t images_per_step);
  ~Progress() { end(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// @param step_seconds  spent in steps so far: without what lies between them, evaluations and checkpoints
  void update(int64_t step, double loss, double step_seconds);
  /// Ends the line of a bar that is not full.
  void end();
  /// Mean over the steps so far; 0 before the first update.
  double images_per_second() const;

 private:
  using Clock = std::chrono::steady_clock;

  void draw(int64_t step);

  std::ostream& stream_;
  bool terminal_;
  int64_t total_steps_;
  int64_t images_per_step_;
  int64_t steps_done_ = 0;
  double step_seconds_ = 0;
  double mean_loss_ = 0;
  bool line_is_open_ = false;
  Clock::time_point start_ = Clock::now();
  Clock::time_point last_drawn_ = start_;
};

/// Seconds as "1:05" or "2:00:09".
std::string format_duration(double seconds);

}  // namespace m2teacher
