#include "commands/stop_signal.h"

#include <array>
#include <csignal>

namespace m2teacher {
namespace {

struct Caught {
  int signal;
  struct sigaction before;
};

std::array<Caught, 3> caught = {{{SIGHUP, {}}, {SIGINT, {}}, {SIGTERM, {}}}};
volatile std::sig_atomic_t stop_received = 0;

/// Puts back what was there before: what ends the process, as a rule.
void let_go() {
  for (const Caught& each : caught) {
    sigaction(each.signal, &each.before, nullptr);
  }
}

void remember(int /*signal*/) {
  stop_received = 1;
  let_go();
}

}  // namespace

StopSignal::StopSignal() {
  stop_received = 0;
  struct sigaction action = {};
  action.sa_handler = remember;
  action.sa_flags = SA_RESTART;  // files are read and written to the end
  for (Caught& each : caught) {
    sigaction(each.signal, nullptr, &each.before);
    // Whoever started us had it ignored, as shells do for SIGINT in the background.
    if (each.before.sa_handler != SIG_IGN) {
      sigaction(each.signal, &action, nullptr);
    }
  }
}

StopSignal::~StopSignal() { let_go(); }

bool StopSignal::received() const { return stop_received != 0; }

}  // namespace m2teacher
