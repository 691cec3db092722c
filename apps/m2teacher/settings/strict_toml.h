#pragma once

#include <CLI/ConfigFwd.hpp>
#include <CLI/Error.hpp>

#include <istream>
#include <string>
#include <vector>

namespace m2teacher {

/// CLI11's TOML, but a name that comes twice is an error where CLI11 keeps the first and says nothing.
class StrictToml : public CLI::ConfigTOML {
 public:
  std::vector<CLI::ConfigItem> from_config(std::istream& input) const override;
};

/// In one line what is wrong with a command line or a file of options.
std::string words_of(const CLI::ParseError& error);

}  // namespace m2teacher
