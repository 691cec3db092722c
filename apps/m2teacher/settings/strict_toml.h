#pragma once

#include <CLI/ConfigFwd.hpp>
#include <CLI/Error.hpp>

#include <istream>
#include <string>
#include <vector>

namespace m2teacher {

/// CLI11's TOML, but a name that comes twice and a list that never closes are errors where CLI11 makes something of
/// them and says nothing.
class StrictToml : public CLI::ConfigTOML {
 public:
  std::vector<CLI::ConfigItem> from_config(std::istream& input) const override;
};

/// In one line what is wrong with a command line or a file of options.
std::string words_of(const CLI::ParseError& error);

}  // namespace m2teacher
