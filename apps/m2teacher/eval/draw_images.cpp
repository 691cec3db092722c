#include "eval/draw_images.h"

#include "data/random.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/randperm.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <map>
#include <tuple>
#include <vector>

namespace m2teacher {

at::Tensor all_images(const ImageSource& source) { return at::arange(source.size(), at::kLong); }

at::Tensor labelled_images(const ImageSource& source) {
  const at::Tensor labels = source.labels();
  return labels.defined() ? labels.ge(0).nonzero().flatten() : all_images(source);
}

at::Tensor draw_images(const ImageSource& source, const at::Tensor& among, int64_t count, Spread spread,
                       uint64_t seed) {
  at::Generator generator =
      at::make_generator<at::CPUGeneratorImpl>(derived_seed(seed, Purpose::Evaluation, static_cast<int64_t>(spread)));
  const at::Tensor shuffled = among.index_select(0, at::randperm(among.size(0), generator, at::kLong));
  std::map<int64_t, std::vector<int64_t>> members;  // of each class, in random order
  const at::Tensor labels =
      source.labels().defined() ? source.labels().index_select(0, shuffled) : at::zeros_like(among);
  for (int64_t i = 0; i < shuffled.size(0); ++i) {
    members[labels.const_data_ptr<int64_t>()[i]].push_back(shuffled.const_data_ptr<int64_t>()[i]);
  }
  // Each image has a place: the k-th of a class of n is the (k + shift) / n-th part of the way through all, or the k-th
  // turn. The first places win.
  std::vector<std::tuple<double, int64_t, int64_t>> places;
  Random random(Purpose::Evaluation, {.seed = seed, .batch = 0, .view = 0, .place = 0});
  for (const auto& [label, images] : members) {
    const double shift = spread == Spread::Proportional ? random.uniform() : 0;
    const double length = spread == Spread::Proportional ? static_cast<double>(images.size()) : 1;
    for (size_t k = 0; k < images.size(); ++k) {
      places.emplace_back((static_cast<double>(k) + shift) / length, label, images[k]);
    }
  }
  std::sort(places.begin(), places.end());
  places.resize(std::min(places.size(), static_cast<size_t>(count)));
  std::vector<int64_t> drawn;
  drawn.reserve(places.size());
  for (const auto& [place, label, image] : places) {
    drawn.push_back(image);
  }
  if (spread == Spread::Proportional) {
    std::sort(drawn.begin(), drawn.end());
  }
  return at::tensor(drawn, at::kLong);
}

}  // namespace m2teacher
