#include "output/metrics.h"

#include "error.h"

#include <cerrno>
#include <cstring>

namespace m2teacher {

MetricsFile::MetricsFile(const std::filesystem::path& path) : path_(path), stream_(path) {
  stream_ << "step,images,loss,learning_rate,param_momentum,bn_momentum,images_per_second,teacher_knn\n" << std::flush;
  if (!stream_) {
    throw UserError(path.string() + ": cannot be written: " + std::strerror(errno));
  }
}

void MetricsFile::add(const StepReport& report) {
  last_ = report;
  loss_sum_ += report.loss;
  ++loss_count_;
}

void MetricsFile::write_row(int64_t images_seen, double images_per_second, std::optional<double> knn) {
  stream_ << last_.step << ',' << images_seen << ',' << loss_sum_ / static_cast<double>(loss_count_) << ','
          << last_.learning_rate << ',' << last_.param_momentum << ',' << last_.bn_momentum << ',' << images_per_second
          << ',';
  if (knn) {
    stream_ << *knn;
  }
  stream_ << '\n' << std::flush;
  if (!stream_) {
    throw UserError(path_.string() + ": cannot be written: " + std::strerror(errno));
  }
  loss_sum_ = 0;
  loss_count_ = 0;
}

}  // namespace m2teacher
