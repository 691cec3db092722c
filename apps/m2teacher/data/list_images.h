#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace m2teacher {

/// The image files below a folder.
struct ImageListing {
  std::vector<std::filesystem::path> files;      ///< relative to the folder, in order of their names
  std::map<std::string, int64_t> other_endings;  ///< how many files have names that end so, and are no images
  std::vector<std::filesystem::path> repeats;    ///< links to folders that are searched under another name
};

/// Finds the files below a folder that are named as JPEG and PNG files are. What is hidden is left out. Links are
/// followed, but each folder is searched once: under its own name if that lies below `root`, and never one that `root`
/// itself lies in.
/// @throws UserError  a folder cannot be searched
ImageListing list_images(const std::filesystem::path& root);

/// In one line what was passed over, and why; empty where nothing was.
std::vector<std::string> describe_passed_over(const std::filesystem::path& root, const ImageListing& listing);

}  // namespace m2teacher
