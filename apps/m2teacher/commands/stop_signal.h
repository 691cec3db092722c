#pragma once

namespace m2teacher {

/// While it lives, the first SIGINT or SIGTERM is only remembered, for the run to end at its next step. The second ends
/// the process at once, as it would without this. One at a time.
class StopSignal {
 public:
  StopSignal();
  ~StopSignal();
  StopSignal(const StopSignal&) = delete;
  StopSignal& operator=(const StopSignal&) = delete;

  bool received() const;
};

}  // namespace m2teacher
