#include "settings/strict_toml.h"

#include <CLI/CLI.hpp>

#include <set>
#include <string>

namespace m2teacher {

std::vector<CLI::ConfigItem> StrictToml::from_config(std::istream& input) const {
  std::vector<CLI::ConfigItem> items = CLI::ConfigTOML::from_config(input);
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
