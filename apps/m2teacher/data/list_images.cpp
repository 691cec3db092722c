#include "data/list_images.h"

#include "error.h"

#include <sys/stat.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstring>
#include <set>
#include <utility>

namespace m2teacher {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMostEndingsNamed = 3;

std::string ending_of(const fs::path& path) {
  std::string ending = path.extension().string();
  std::transform(ending.begin(), ending.end(), ending.begin(),
                 [](unsigned char letter) { return static_cast<char>(std::tolower(letter)); });
  return ending;
}

bool is_image_ending(const std::string& ending) { return ending == ".jpg" || ending == ".jpeg" || ending == ".png"; }

[[noreturn]] void fail_to_search(const fs::path& folder, const std::string& reason) {
  throw UserError(folder.string() + ": cannot be searched for images: " + reason);
}

/// A search that remembers which folders it has been in.
class Search {
 public:
  explicit Search(const fs::path& root) : root_(root) {
    std::error_code error;
    const fs::path whole = fs::canonical(root, error);
    if (error) {
      fail_to_search(root, error.message());
    }
    for (fs::path above = whole; above != above.root_path();) {
      above = above.parent_path();
      enter(above);
    }
  }

  ImageListing run() {
    search_tree(root_);
    // Links come last, so that a folder goes by its own name.
    while (!links_.empty()) {
      const fs::path link = *links_.begin();
      links_.erase(links_.begin());
      if (!search_tree(link)) {
        listing_.repeats.push_back(link.lexically_relative(root_));
      }
    }
    std::sort(listing_.files.begin(), listing_.files.end());
    return std::move(listing_);
  }

 private:
  /// @return whether the search has not been there before
  bool enter(const fs::path& folder) {
    struct stat status = {};
    if (stat(folder.c_str(), &status) != 0) {
      fail_to_search(folder, std::strerror(errno));
    }
    return entered_.emplace(status.st_dev, status.st_ino).second;
  }

  /// @return false: the search has been there before
  bool search_tree(const fs::path& top) {
    std::vector<fs::path> folders = {top};
    bool any = false;
    while (!folders.empty()) {
      const fs::path folder = std::move(folders.back());
      folders.pop_back();
      if (enter(folder)) {
        any = true;
        search_folder(folder, folders);
      }
    }
    return any;
  }

  /// @param folders  gets the folders in it
  void search_folder(const fs::path& folder, std::vector<fs::path>& folders) {
    std::error_code error;
    fs::directory_iterator entry(folder, error);
    for (; !error && entry != fs::directory_iterator(); entry.increment(error)) {
      const fs::path& path = entry->path();
      std::error_code lost;  // a link to nothing is no folder
      if (path.filename().string().starts_with('.')) {
        continue;
      }
      if (!entry->is_directory(lost)) {
        note_file(*entry);
      } else if (entry->is_symlink(lost)) {
        links_.insert(path);
      } else {
        folders.push_back(path);
      }
    }
    if (error) {
      fail_to_search(folder, error.message());
    }
  }

  void note_file(const fs::directory_entry& entry) {
    const std::string ending = ending_of(entry.path());
    if (is_image_ending(ending)) {
      listing_.files.push_back(entry.path().lexically_relative(root_));
    } else {
      ++listing_.other_endings[ending];
    }
  }

  fs::path root_;
  ImageListing listing_;
  std::set<std::pair<dev_t, ino_t>> entered_;
  std::set<fs::path> links_;
};

std::string counted(int64_t count, const std::string& thing) {
  return std::to_string(count) + ' ' + thing + (count == 1 ? "" : "s");
}

}  // namespace

ImageListing list_images(const fs::path& root) { return Search(root).run(); }

std::vector<std::string> describe_passed_over(const fs::path& root, const ImageListing& listing) {
  std::vector<std::string> notes;
  int64_t files = 0;
  std::vector<std::pair<int64_t, std::string>> endings;
  for (const auto& [ending, count] : listing.other_endings) {
    files += count;
    endings.emplace_back(count, ending.empty() ? "none" : ending);
  }
  if (files > 0) {
    std::stable_sort(endings.begin(), endings.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
    std::string most;
    for (size_t i = 0; i < std::min(endings.size(), kMostEndingsNamed); ++i) {
      most += (i == 0 ? "" : ", ") + std::to_string(endings[i].first) + " of " + endings[i].second;
    }
    notes.push_back(root.string() + ": " + counted(files, "file") +
                    " passed over, as images are files whose names end in .jpg, .jpeg or .png (found: " + most +
                    (endings.size() > kMostEndingsNamed ? ", ..." : "") + ")");
  }
  if (!listing.repeats.empty()) {
    notes.push_back(root.string() + ": " + counted(static_cast<int64_t>(listing.repeats.size()), "link") +
                    " not followed to folders that are searched anyway or lie above, the first: " +
                    listing.repeats.front().string());
  }
  return notes;
}

}  // namespace m2teacher
