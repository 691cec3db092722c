#include "ops/cpu/merged_statistics.h"

namespace momentum_bn::cpu {

MergedStatistics::MergedStatistics(const at::Tensor& all) {
  const auto rows = all.to(at::kDouble).contiguous();
  const int64_t channels = (rows.size(1) - 1) / 2;
  mean.resize(static_cast<size_t>(channels));
  m2.resize(static_cast<size_t>(channels));
  for (int64_t rank = 0; rank < rows.size(0); ++rank) {
    const double* row = rows.const_data_ptr<double>() + rank * rows.size(1);
    const double count_of_rank = row[2 * channels];
    if (count_of_rank > 0) merge(row, row + channels, count_of_rank);
  }
}

void MergedStatistics::merge(const double* mean_of_rank, const double* m2_of_rank, double count_of_rank) {
  const size_t channels = mean.size();
  if (count == 0) {
    mean.assign(mean_of_rank, mean_of_rank + channels);
    m2.assign(m2_of_rank, m2_of_rank + channels);
    count = count_of_rank;
    return;
  }
  const double share = count_of_rank / (count + count_of_rank);
  for (size_t c = 0; c < channels; ++c) {
    const double delta = mean_of_rank[c] - mean[c];
    mean[c] += delta * share;
    m2[c] += m2_of_rank[c] + delta * delta * (count * share);
  }
  count += count_of_rank;
}

}  // namespace momentum_bn::cpu
