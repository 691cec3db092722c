#include "output/metrics.h"

#include "error.h"
#include "regular_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstring>
#include <fstream>
#include <string_view>

namespace m2teacher {
namespace {

constexpr std::string_view kHead =
    "step,images,loss,learning_rate,param_momentum,bn_momentum,teacher_knn,seconds,images_per_second";
constexpr size_t kSecondsColumn = 7;
constexpr int kTimeDigits = 1;
constexpr size_t kLineBytes = 1024;

/// The shortest text that gives the same number back.
std::string exact(double value) {
  std::array<char, 32> text{};
  const auto end = std::to_chars(text.begin(), text.end(), value);
  return {text.data(), end.ptr};
}

std::string rounded(double value) {
  std::array<char, 64> text{};
  const auto end = std::to_chars(text.begin(), text.end(), value, std::chars_format::fixed, kTimeDigits);
  return {text.data(), end.ptr};
}

/// The number in the given column of a row; 0 where there is none.
double column(std::string_view row, size_t index) {
  for (size_t skipped = 0; skipped < index; ++skipped) {
    row.remove_prefix(std::min(row.find(','), row.size() - 1) + 1);
  }
  double value = 0;
  std::from_chars(row.data(), row.data() + row.size(), value);
  return std::isfinite(value) ? value : 0;
}

}  // namespace

MetricsFile::MetricsFile(const std::filesystem::path& path) : path_(path.string()) {
  refuse_irregular(path);
  file_ = FileDescriptor(path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND);
  if (!file_.is_open()) {
    fail();
  }
  append(std::string(kHead) + '\n');
}

MetricsFile::MetricsFile(const std::filesystem::path& path, const MetricsState& state)
    : path_(path.string()), state_(state) {
  refuse_irregular(path);
  errno = 0;
  std::ifstream stream(path, std::ios::binary);
  std::array<char, kLineBytes> buffer{};
  std::string_view line;
  // A line that the file's end cuts off is none, nor is one that no run writes, it being too long.
  const auto next_line = [&] {
    const bool whole = stream.getline(buffer.data(), buffer.size()) && !stream.eof();
    line = buffer.data();
    if (!stream.is_open() || stream.bad()) {
      throw UserError(path_ + ": cannot be read: " + std::strerror(errno != 0 ? errno : EIO));
    }
    return whole;
  };
  if (!next_line() || line != kHead) {
    throw UserError(path_ +
                    ": not the metrics of a run of m2teacher, or lost: the run goes on with a new one if this is "
                    "removed");
  }
  auto kept = static_cast<off_t>(line.size() + 1);
  for (int64_t row = 0; row < state.rows; ++row) {
    if (!next_line()) {
      throw UserError(path_ + ": has lost rows: holds " + std::to_string(row) + ", the checkpoint was saved after " +
                      std::to_string(state.rows) + "; the run goes on with a new one if this is removed");
    }
    kept += static_cast<off_t>(line.size() + 1);
    seconds_ = column(line, kSecondsColumn);
  }
  file_ = FileDescriptor(path, O_WRONLY | O_APPEND);
  if (!file_.is_open() || ftruncate(file_.get(), kept) != 0) {
    fail();
  }
}

void MetricsFile::fail() const { throw UserError(path_ + ": cannot be written: " + std::strerror(errno)); }

void MetricsFile::append(const std::string& text) {
  if (!file_.write(text.data(), text.size())) {
    fail();
  }
}

void MetricsFile::add(const StepReport& report, int64_t images, double seconds) {
  last_ = report;
  state_.loss_sum += report.loss();
  ++state_.loss_count;
  images_since_row_ += images;
  seconds_since_row_ += seconds;
}

void MetricsFile::write_row(int64_t images_seen, std::optional<double> knn) {
  seconds_ += seconds_since_row_;
  const double rate = seconds_since_row_ > 0 ? static_cast<double>(images_since_row_) / seconds_since_row_ : 0;
  append(std::to_string(last_.step) + ',' + std::to_string(images_seen) + ',' +
         exact(state_.loss_sum / static_cast<double>(state_.loss_count)) + ',' + exact(last_.learning_rate) + ',' +
         exact(last_.param_momentum) + ',' + exact(last_.bn_momentum) + ',' + (knn ? exact(*knn) : "") + ',' +
         rounded(seconds_) + ',' + rounded(rate) + '\n');
  state_ = {.rows = state_.rows + 1, .loss_count = 0, .loss_sum = 0};
  seconds_since_row_ = 0;
  images_since_row_ = 0;
}

void MetricsFile::flush() {
  if (!file_.flush()) {
    fail();
  }
}

}  // namespace m2teacher
