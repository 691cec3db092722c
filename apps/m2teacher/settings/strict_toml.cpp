#include "settings/strict_toml.h"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <set>
#include <sstream>
#include <string>
#include <utility>

namespace m2teacher {

namespace {

// CLI11 keeps with each name all the sections that it lies in, and for a section all those above.
constexpr size_t kMostCharacters = size_t{1} << 18;
constexpr size_t kMostCharactersOfName = 256;
constexpr std::ptrdiff_t kMostPoints = 16;

[[noreturn]] void fail(const std::string& what) { throw CLI::ConfigError(what, CLI::ExitCodes::ConfigError); }

/// The text, unless it is longer than reading it is worth.
std::istringstream bounded(std::istream& input) {
  std::string text(kMostCharacters + 1, '\0');
  input.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(input.gcount()));
  if (text.size() > kMostCharacters) {
    fail("longer than " + std::to_string(kMostCharacters) + " characters");
  }
  return std::istringstream(text);
}

void check_name(const std::string& name) {
  if (std::count(name.begin(), name.end(), '.') > kMostPoints) {
    fail("a name of more than " + std::to_string(kMostPoints) + " sections: " + name.substr(0, 40) + "...");
  }
  if (name.size() > kMostCharactersOfName) {
    fail("a name of more than " + std::to_string(kMostCharactersOfName) + " characters: " + name.substr(0, 40) + "...");
  }
}

bool is_comment(const std::string& line) { return line.starts_with('#') || line.starts_with(';'); }

bool is_section(const std::string& line) { return line.starts_with('[') && line.ends_with(']'); }

std::string name_of(const std::string& line) {
  return CLI::detail::trim_copy(line.substr(0, line.find(line.find('=') != std::string::npos ? '=' : '#')));
}

/// Whether the line begins a list that goes on in the next one.
bool leaves_list_open(const std::string& line) {
  const size_t equals = line.find('=');
  const std::string behind = equals != std::string::npos ? line.substr(equals + 1) : "";
  const std::string value = CLI::detail::trim_copy(behind.substr(0, behind.find('#')));
  return value.size() > 1 && value.starts_with('[') && !value.ends_with(']');
}

/// A list's lines from the second to the one that closes it. CLI11 takes the end of the file for a bracket, and the
/// last character with it.
std::string rest_of_list(std::istream& lines, const std::string& name, int64_t& number) {
  const int64_t first = number;
  std::string rest;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    CLI::detail::trim(line);
    rest += '\n' + line;
    if (line.ends_with(']')) {
      return rest;
    }
  }
  fail("line " + std::to_string(first) + ": the list of '" + name + "' has no closing ]");
}

}  // namespace

std::vector<CLI::ConfigItem> StrictToml::from_config(std::istream& input) const {
  std::istringstream lines = bounded(input);
  std::vector<CLI::ConfigItem> items;
  std::set<std::string> names;
  std::string section;
  int64_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    CLI::detail::trim(line);
    if (is_comment(line)) {
      continue;
    }
    if (is_section(line)) {
      check_name(line);
      section = line;
      continue;
    }
    const std::string name = name_of(line);
    check_name(name);
    if (leaves_list_open(line)) {
      line += rest_of_list(lines, name, number);
    }
    // CLI11 would make one of two options of the same name that follow each other, so it gets them one by one.
    std::istringstream option(section + '\n' + line);
    for (CLI::ConfigItem& item : CLI::ConfigTOML::from_config(option)) {
      // Marks of where a section begins and ends, which only files that call commands need.
      if (item.name == "++" || item.name == "--") {
        continue;
      }
      if (!names.insert(item.fullname()).second) {
        fail("line " + std::to_string(number) + ": '" + item.fullname() + "' is set twice");
      }
      items.push_back(std::move(item));
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
