#include "commands/features.h"

#include "error.h"
#include "output/atomic_file.h"
#include "output/npy.h"
#include "text/printable.h"

#include <iostream>
#include <string>
#include <vector>

namespace m2teacher {
namespace {

void refuse_line_breaks(const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    if (name.find('\n') != std::string::npos) {
      throw UserError(printable(name) + ": has a line break in its name, which a list of names cannot hold");
    }
  }
}

std::vector<std::string> names_of_files(const ImageSource& images) {
  std::vector<std::string> names;
  for (const std::filesystem::path& file : images.files()) {
    names.push_back(file.string());
  }
  return names;
}

class Writer {
 public:
  explicit Writer(std::filesystem::path folder) : folder_(std::move(folder)) { make_writable_folder(folder_); }

  void array(const std::string& name, const at::Tensor& values) const {
    write_npy(folder_ / name, values);
    say(name);
  }
  void lines(const std::string& name, const std::vector<std::string>& lines) const {
    std::string text;
    for (const std::string& line : lines) {
      text += line + '\n';
    }
    write_text_file(folder_ / name, text);
    say(name);
  }

 private:
  void say(const std::string& name) const { std::cout << (folder_ / name).string() << '\n'; }

  std::filesystem::path folder_;
};

void write_set(const Writer& writer, const Evaluation& evaluation, const Encoder& encoder,
               const std::shared_ptr<const ImageSource>& images, const std::string& set) {
  const LabelledFeatures found = evaluation.features(encoder, images);
  writer.array(set + "-features.npy", found.features.cpu());
  if (found.labels.defined()) {
    writer.array(set + "-labels.npy", found.labels);
  }
  if (const std::vector<std::string> files = names_of_files(*images); !files.empty()) {
    std::vector<std::string> rows;
    rows.reserve(static_cast<size_t>(found.index.size(0)));
    for (int64_t row = 0; row < found.index.size(0); ++row) {
      rows.push_back(files[static_cast<size_t>(found.index[row].item<int64_t>())]);
    }
    writer.lines(set + "-files.txt", rows);
  }
}

}  // namespace

void run_features(const FeaturesCommand& command) {
  const Evaluation evaluation = open_evaluation(command.source);
  const Dataset& dataset = evaluation.dataset;
  std::vector<std::pair<std::string, std::shared_ptr<const ImageSource>>> sets = {{"train", dataset.train}};
  if (dataset.test) {
    sets.emplace_back("test", dataset.test);
  }
  for (const auto& [set, images] : sets) {  // before the work
    refuse_line_breaks(names_of_files(*images));
  }
  const Encoder encoder = evaluation.encoder(command.side);
  const Writer writer(command.out);
  for (const auto& [set, images] : sets) {
    write_set(writer, evaluation, encoder, images, set);
  }
  if (!dataset.class_names.empty()) {
    writer.lines("classes.txt", dataset.class_names);
  }
}

}  // namespace m2teacher
