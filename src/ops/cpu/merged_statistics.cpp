#include "ops/cpu/merged_statistics.h"

#include "kernels/channel_rules.h"

namespace momentum_bn::cpu {

MergedStatistics::MergedStatistics(const at::Tensor& all) {
  const auto rows = all.to(at::kDouble).contiguous();
  const int64_t channels = (rows.size(1) - 1) / 2;
  mean.resize(static_cast<size_t>(channels));
  m2.resize(static_cast<size_t>(channels));
  const double* counts = rows.const_data_ptr<double>() + 2 * channels;
  for (int64_t rank = 0; rank < rows.size(0); ++rank) {
    const double count_of_rank = counts[rank * rows.size(1)];
    count += count_of_rank > 0 ? count_of_rank : 0;
  }
  for (int64_t c = 0; c < channels; ++c) {
    kernels::BatchMoments moments = {0, 0, 0};
    for (int64_t rank = 0; rank < rows.size(0); ++rank) {
      const double* row = rows.const_data_ptr<double>() + rank * rows.size(1);
      kernels::merge(moments, {row[c], row[channels + c], row[2 * channels]});
    }
    mean[static_cast<size_t>(c)] = moments.mean;
    m2[static_cast<size_t>(c)] = moments.m2;
  }
}

}  // namespace momentum_bn::cpu
