#include "data/image_folder.h"

#include "data/decode_image.h"
#include "data/list_images.h"
#include "error.h"
#include "text/printable.h"

#include <ATen/ops/tensor.h>

#include <algorithm>
#include <iostream>
#include <map>

namespace m2teacher {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kRgb = 3;
constexpr int kMostShrink = 8;

/// The most that a JPEG may be shrunk by as it is decoded so that no part has to be scaled up for it.
int largest_shrink(const std::vector<CropBox>& boxes, int64_t height, int64_t width, int64_t side) {
  int shrink = kMostShrink;
  for (const CropBox& box : boxes) {
    const double shortest = std::min(box.width * static_cast<double>(width), box.height * static_cast<double>(height));
    while (shrink > 1 && shortest < static_cast<double>(side * shrink)) {
      shrink /= 2;
    }
  }
  return shrink;
}

/// Image files with the classes of each.
struct LabelledFiles {
  std::vector<fs::path> files;
  std::vector<std::string> classes;  ///< of each file; empty for one that has none
  int64_t unlabelled = 0;            ///< files without a class
  std::string first_unlabelled;
};

/// @param notes  gets what users should know
LabelledFiles find_labelled(const fs::path& root, std::vector<std::string>& notes) {
  const ImageListing listing = list_images(root);
  if (listing.files.empty()) {
    throw UserError(root.string() + ": holds no image (.jpg, .jpeg or .png)");
  }
  for (std::string& note : describe_passed_over(root, listing)) {
    notes.push_back(std::move(note));
  }
  LabelledFiles found;
  for (const fs::path& relative : listing.files) {
    found.files.push_back(root / relative);
    const bool in_folder = std::next(relative.begin()) != relative.end();
    found.classes.push_back(in_folder ? relative.begin()->string() : "");
    if (!in_folder && found.unlabelled++ == 0) {
      found.first_unlabelled = relative.string();
    }
  }
  return found;
}

/// Numbers of the classes. A single folder beside images that lie in none is no class.
std::map<std::string, int64_t> number_classes(const LabelledFiles& train) {
  std::map<std::string, int64_t> number_of;
  for (const std::string& name : train.classes) {
    if (!name.empty()) {
      number_of.emplace(name, 0);
    }
  }
  if (number_of.size() == 1 && train.unlabelled > 0) {
    number_of.clear();
  }
  int64_t next = 0;
  for (auto& [name, number] : number_of) {
    number = next++;
  }
  return number_of;
}

/// @return (N), int64, or undefined where no file has a class
at::Tensor labels_of(const LabelledFiles& found, const std::map<std::string, int64_t>& number_of) {
  if (number_of.empty() || found.unlabelled == static_cast<int64_t>(found.files.size())) {
    return {};
  }
  std::vector<int64_t> labels;
  for (size_t i = 0; i < found.files.size(); ++i) {
    const auto number = number_of.find(found.classes[i]);
    if (number == number_of.end() && !found.classes[i].empty()) {
      throw UserError(found.files[i].string() + ": is of class '" + found.classes[i] +
                      "', of which there are no training images");
    }
    labels.push_back(number == number_of.end() ? -1 : number->second);
  }
  return at::tensor(labels, at::kLong);
}

/// What users should know of images that lie in no class's folder; nothing where that goes without saying.
void note_unlabelled(const fs::path& root, const LabelledFiles& found, bool labels, std::vector<std::string>& notes) {
  const bool any_folder = found.unlabelled < static_cast<int64_t>(found.files.size());
  if (found.unlabelled > 0 && (labels || any_folder)) {
    notes.push_back(root.string() + ": " + std::to_string(found.unlabelled) + " of " +
                    std::to_string(found.files.size()) +
                    " images in no class's folder, the first: " + found.first_unlabelled +
                    (labels ? "; without a label they count in training alone" : "; so no image has a label"));
  }
}

}  // namespace

FolderSource::FolderSource(std::vector<fs::path> files, at::Tensor labels, const DataOptions& options)
    : files_(std::move(files)),
      labels_(std::move(labels)),
      side_(options.image_size),
      centre_crop_(options.centre_crop),
      strict_(options.strict),
      max_pixels_(options.max_pixels),
      known_unreadable_(files_.size(), false) {}

ImageShape FolderSource::shape() const { return {.channels = kRgb, .height = side_, .width = side_}; }

bool FolderSource::read(int64_t index, const ChooseBoxes& choose, const std::vector<uint8_t*>& into) const {
  try {
    const ImageFile file(files_[index], max_pixels_);
    const std::vector<CropBox> boxes = choose(file.height(), file.width());
    const at::Tensor image = file.decode(largest_shrink(boxes, file.height(), file.width(), side_));
    for (size_t i = 0; i < boxes.size(); ++i) {
      scale_part(image, boxes[i], side_, side_, into[i]);
    }
    return true;
  } catch (const std::bad_alloc&) {
    note_unreadable(index, "takes more memory than there is");
  } catch (const std::exception& error) {  // ImageError, and torch's where memory is short
    const std::string reason = error.what();
    note_unreadable(index, reason.substr(0, reason.find('\n')));
  }
  return false;
}

bool FolderSource::read_centre(int64_t index, uint8_t* into) const {
  const auto centre = [this](int64_t height, int64_t width) {
    const double shorter = static_cast<double>(std::min(height, width)) * centre_crop_;
    CropBox box;
    box.width = shorter / static_cast<double>(width);
    box.height = shorter / static_cast<double>(height);
    box.left = (1 - box.width) / 2;
    box.top = (1 - box.height) / 2;
    return std::vector<CropBox>{box};
  };
  return read(index, centre, {into});
}

void FolderSource::note_unreadable(int64_t index, const std::string& reason) const {
  const std::string message = files_[index].string() + ": unreadable image: " + reason;
  if (strict_) {
    throw UserError(message);
  }
  const std::lock_guard lock(mutex_);
  if (!known_unreadable_[index]) {
    known_unreadable_[index] = true;
    std::cerr << "m2teacher: warning: " << printable(message) << " (passed over)\n";
  }
}

int64_t FolderSource::unreadable() const {
  const std::lock_guard lock(mutex_);
  return std::count(known_unreadable_.begin(), known_unreadable_.end(), true);
}

std::vector<fs::path> FolderSource::files() const { return files_; }

Dataset load_image_folder(const DataOptions& options) {
  const fs::path& root = options.spec.folder;
  const bool split = fs::is_directory(root / "train");
  Dataset dataset;
  std::map<std::string, int64_t> number_of;
  const auto load = [&](const fs::path& part, bool train) {
    const LabelledFiles found = find_labelled(part, dataset.notes);
    if (train) {
      number_of = number_classes(found);
    }
    const at::Tensor labels = labels_of(found, number_of);
    note_unlabelled(part, found, !number_of.empty(), dataset.notes);
    return std::make_shared<FolderSource>(found.files, labels, options);
  };
  dataset.train = load(split ? root / "train" : root, /*train=*/true);
  for (const char* name : {"test", "val"}) {
    if (split && !dataset.test && fs::is_directory(root / name)) {
      dataset.test = load(root / name, /*train=*/false);
    }
  }
  for (const auto& [name, number] : number_of) {
    dataset.class_names.push_back(name);
  }
  dataset.pixels = imagenet_pixels();
  return dataset;
}

}  // namespace m2teacher
