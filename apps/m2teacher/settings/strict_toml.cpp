#include "settings/strict_toml.h"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstddef>
#include <set>
#include <sstream>
#include <string>

namespace m2teacher {

namespace {

// CLI11 keeps with each name all the sections that it lies in, and for a section all those above.
constexpr size_t kMostCharacters = size_t{1} << 18;
constexpr std::ptrdiff_t kMostPoints = 16;

/// The text, unless reading it would take more time and memory than it is worth.
std::istringstream bounded(std::istream& input) {
  std::string text(kMostCharacters + 1, '\0');
  input.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(input.gcount()));
  if (text.size() > kMostCharacters) {
    throw CLI::ConfigError("longer than " + std::to_string(kMostCharacters) + " characters",
                           CLI::ExitCodes::ConfigError);
  }
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const std::string name = line.substr(0, line.find('='));
    if (std::count(name.begin(), name.end(), '.') > kMostPoints) {
      throw CLI::ConfigError(
          "a name of more than " + std::to_string(kMostPoints) + " sections: " + name.substr(0, 40) + "...",
          CLI::ExitCodes::ConfigError);
    }
  }
  return std::istringstream(text);
}

}  // namespace

std::vector<CLI::ConfigItem> StrictToml::from_config(std::istream& input) const {
  std::istringstream text = bounded(input);
  std::vector<CLI::ConfigItem> items = CLI::ConfigTOML::from_config(text);
  // Marks of where a section begins and ends, which only files that call commands need.
  std::erase_if(items, [](const CLI::ConfigItem& item) { return item.name == "++" || item.name == "--"; });
  std::set<std::string> names;
  for (const CLI::ConfigItem& item : items) {
    if (!names.insert(item.fullname()).second) {
      throw CLI::ConfigError("'" + item.fullname() + "' is set twice", CLI::ExitCodes::ConfigError);
    }
  }
  return items;
}

std::string words_of(const CLI::ParseError& error) {
  const std::string text = error.what();
  const std::string line = text.substr(0, text.find('\n'));
  const std::string unknown = "INI was not able to parse ";  // of a name that no option has
  return line.starts_with(unknown) ? "no such option: " + line.substr(unknown.size()) : line;
}

}  // namespace m2teacher
