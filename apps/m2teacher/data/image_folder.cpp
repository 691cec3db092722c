#include "data/image_folder.h"

#include "data/decode_image.h"
#include "error.h"

#include <ATen/ops/_upsample_bilinear2d_aa.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstring>
#include <iostream>
#include <map>

namespace m2teacher {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kRgb = 3;
constexpr int kMostShrink = 8;

/// Part of an image in pixels.
struct PixelBox {
  int64_t left;
  int64_t top;
  int64_t width;
  int64_t height;
};

PixelBox in_pixels(const CropBox& box, int64_t height, int64_t width) {
  const auto length = [](double share, int64_t side) {
    return std::clamp<int64_t>(std::llround(share * static_cast<double>(side)), 1, side);
  };
  const auto start = [](double share, int64_t side, int64_t taken) {
    return std::clamp<int64_t>(std::llround(share * static_cast<double>(side)), 0, side - taken);
  };
  PixelBox pixels{};
  pixels.width = length(box.width, width);
  pixels.height = length(box.height, height);
  pixels.left = start(box.left, width, pixels.width);
  pixels.top = start(box.top, height, pixels.height);
  return pixels;
}

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

/// @param image  (height, width, 3), uint8, contiguous
void scale(const at::Tensor& image, const CropBox& box, int64_t side, uint8_t* into) {
  const PixelBox from = in_pixels(box, image.size(0), image.size(1));
  // (1, 3, h, w) in channels last, for which ATen has a fast kernel of 8-bit numbers.
  const at::Tensor part = image.narrow(0, from.top, from.height)
                              .narrow(1, from.left, from.width)
                              .contiguous()
                              .permute({2, 0, 1})
                              .unsqueeze(0);
  const at::Tensor scaled = at::_upsample_bilinear2d_aa(part, {side, side}, /*align_corners=*/false)
                                .contiguous(at::MemoryFormat::ChannelsLast);
  std::memcpy(into, scaled.const_data_ptr<uint8_t>(), static_cast<size_t>(side * side * kRgb));
}

bool is_image_name(const fs::path& path) {
  std::string extension = path.extension().string();
  std::transform(extension.begin(), extension.end(), extension.begin(),
                 [](unsigned char letter) { return static_cast<char>(std::tolower(letter)); });
  return extension == ".jpg" || extension == ".jpeg" || extension == ".png";
}

bool is_hidden(const fs::path& path) { return path.filename().string().starts_with('.'); }

/// Images below a folder, relative to it, in order of their names.
std::vector<fs::path> find_images(const fs::path& root) {
  std::vector<fs::path> found;
  try {
    auto entry = fs::recursive_directory_iterator(root, fs::directory_options::follow_directory_symlink);
    for (; entry != fs::recursive_directory_iterator(); ++entry) {
      if (is_hidden(entry->path())) {
        entry.disable_recursion_pending();
      } else if (is_image_name(entry->path()) && !entry->is_directory()) {
        found.push_back(entry->path().lexically_relative(root));
      }
    }
  } catch (const fs::filesystem_error& error) {
    throw UserError(error.path1().string() + ": cannot be searched for images: " + error.code().message());
  }
  std::sort(found.begin(), found.end());
  return found;
}

/// The first folder on the way; empty where there is none.
std::string class_of(const fs::path& relative) {
  return std::next(relative.begin()) == relative.end() ? "" : relative.begin()->string();
}

struct LabelledFiles {
  std::vector<fs::path> files;
  std::vector<std::string> classes;  ///< of each file; empty where not all have one
};

LabelledFiles list_images(const fs::path& root) {
  LabelledFiles listed;
  for (const fs::path& relative : find_images(root)) {
    listed.files.push_back(root / relative);
    listed.classes.push_back(class_of(relative));
  }
  if (listed.files.empty()) {
    throw UserError(root.string() + ": holds no image (.jpg, .jpeg or .png)");
  }
  if (std::find(listed.classes.begin(), listed.classes.end(), "") != listed.classes.end()) {
    listed.classes.clear();
  }
  return listed;
}

std::shared_ptr<FolderSource> make_source(const LabelledFiles& listed, const std::map<std::string, int64_t>& number_of,
                                          const DataOptions& options) {
  at::Tensor labels;
  if (!listed.classes.empty() && !number_of.empty()) {
    std::vector<int64_t> numbers;
    for (size_t i = 0; i < listed.files.size(); ++i) {
      const auto found = number_of.find(listed.classes[i]);
      if (found == number_of.end()) {
        throw UserError(listed.files[i].string() + ": is of class '" + listed.classes[i] +
                        "', of which there are no training images");
      }
      numbers.push_back(found->second);
    }
    labels = at::tensor(numbers, at::kLong);
  }
  return std::make_shared<FolderSource>(listed.files, labels, options);
}

}  // namespace

FolderSource::FolderSource(std::vector<fs::path> files, at::Tensor labels, const DataOptions& options)
    : files_(std::move(files)),
      labels_(std::move(labels)),
      side_(options.image_size),
      centre_crop_(options.centre_crop),
      strict_(options.strict),
      known_unreadable_(files_.size(), false) {}

ImageShape FolderSource::shape() const { return {.channels = kRgb, .height = side_, .width = side_}; }

bool FolderSource::read(int64_t index, const ChooseBoxes& choose, const std::vector<uint8_t*>& into) const {
  try {
    const ImageFile file(files_[index]);
    const std::vector<CropBox> boxes = choose(file.height(), file.width());
    const at::Tensor image = file.decode(largest_shrink(boxes, file.height(), file.width(), side_));
    for (size_t i = 0; i < boxes.size(); ++i) {
      scale(image, boxes[i], side_, into[i]);
    }
    return true;
  } catch (const ImageError& error) {
    note_unreadable(index, error.what());
    return false;
  }
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
    std::cerr << "m2teacher: warning: " << message << " (passed over)\n";
  }
}

int64_t FolderSource::unreadable() const {
  const std::lock_guard lock(mutex_);
  return std::count(known_unreadable_.begin(), known_unreadable_.end(), true);
}

Dataset load_image_folder(const DataOptions& options) {
  const fs::path& root = options.spec.folder;
  const bool split = fs::is_directory(root / "train");
  const LabelledFiles train = list_images(split ? root / "train" : root);

  Dataset dataset;
  std::map<std::string, int64_t> number_of;
  for (const std::string& name : train.classes) {
    number_of.emplace(name, 0);
  }
  for (auto& [name, number] : number_of) {
    number = static_cast<int64_t>(dataset.class_names.size());
    dataset.class_names.push_back(name);
  }
  dataset.train = make_source(train, number_of, options);
  for (const char* name : {"test", "val"}) {
    if (split && !dataset.test && fs::is_directory(root / name)) {
      dataset.test = make_source(list_images(root / name), number_of, options);
    }
  }
  dataset.pixels = kImageNetPixels;
  return dataset;
}

}  // namespace m2teacher
