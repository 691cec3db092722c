#include "output/progress.h"

#include <cmath>
#include <iomanip>
#include <sstream>

namespace m2teacher {
namespace {

constexpr int kBarWidth = 30;
constexpr double kLossDecay = 0.98;
constexpr std::chrono::milliseconds kRedraw{100};
constexpr std::chrono::seconds kPlainLine{10};

}  // namespace

std::string format_duration(double seconds) {
  const auto whole = static_cast<int64_t>(std::llround(seconds));
  std::ostringstream text;
  text << std::setfill('0');
  if (whole >= 3600) {
    text << whole / 3600 << ':' << std::setw(2);
  }
  text << whole / 60 % 60 << ':' << std::setw(2) << whole % 60;
  return text.str();
}

Progress::Progress(std::ostream& stream, bool terminal, int64_t total_steps, int64_t images_per_step)
    : stream_(stream), terminal_(terminal), total_steps_(total_steps), images_per_step_(images_per_step) {}

double Progress::images_per_second() const {
  return step_seconds_ > 0 ? static_cast<double>(steps_done_ * images_per_step_) / step_seconds_ : 0;
}

void Progress::update(int64_t step, double loss, double step_seconds) {
  mean_loss_ = steps_done_ == 0 ? loss : kLossDecay * mean_loss_ + (1 - kLossDecay) * loss;
  ++steps_done_;
  step_seconds_ = step_seconds;
  const auto pause = terminal_ ? Clock::duration(kRedraw) : Clock::duration(kPlainLine);
  if (step == total_steps_ || steps_done_ == 1 || Clock::now() - last_drawn_ >= pause) {
    last_drawn_ = Clock::now();
    draw(step);
  }
}

void Progress::draw(int64_t step) {
  const double passed = std::chrono::duration<double>(Clock::now() - start_).count();
  const double left = passed / static_cast<double>(steps_done_) * static_cast<double>(total_steps_ - step);
  std::ostringstream line;
  line << "step " << step << '/' << total_steps_ << std::fixed << std::setprecision(3) << "  loss " << mean_loss_
       << std::setprecision(0) << "  " << images_per_second() << " images/s  " << format_duration(left) << " left";
  if (!terminal_) {
    stream_ << line.str() << '\n';
    return;
  }
  const auto filled = static_cast<int>(kBarWidth * step / total_steps_);
  // \033[K clears what a longer line before it has left.
  stream_ << "\r[" << std::string(filled, '#') << std::string(kBarWidth - filled, '.') << "] " << line.str()
          << "\033[K";
  line_is_open_ = true;
  if (step == total_steps_) {
    end();
  }
  stream_.flush();
}

void Progress::end() {
  if (line_is_open_) {
    stream_ << '\n';
    line_is_open_ = false;
  }
}

}  // namespace m2teacher
