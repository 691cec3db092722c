#include "settings/run_settings.h"

#include "error.h"
#include "regular_file.h"
#include "settings/run_flags.h"
#include "settings/strict_toml.h"
#include "text/printable.h"

#include <CLI/CLI.hpp>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <memory>
#include <sstream>

namespace m2teacher {
namespace {

constexpr const char* kSection = "pretrain";

/// The options of pretrain outside the program's command line, for their names, checks and values.
class Declaration {
 public:
  explicit Declaration(RunSettings& settings)
      : pretrain_(*root_.add_subcommand(kSection)), root_flags_(root_), run_flags_(pretrain_) {
    root_.allow_config_extras(CLI::config_extras_mode::error);
    root_.config_formatter(std::make_shared<StrictToml>());
    add_threads_flag(root_flags_, settings.threads);
    add_run_flags(run_flags_, settings);
  }

  void parse(std::istream& input) { root_.parse_from_stream(input); }

  const std::vector<Flag>& root_flags() const { return root_flags_.all(); }
  const std::vector<Flag>& run_flags() const { return run_flags_.all(); }

 private:
  CLI::App root_;
  CLI::App& pretrain_;
  Flags root_flags_;
  Flags run_flags_;
};

/// @param file  for messages
RunSettings parse(std::istream& input, const std::string& file) {
  RunSettings settings;
  try {
    Declaration(settings).parse(input);
  } catch (const CLI::ParseError& error) {
    throw UserError(file + ": " + words_of(error));
  }
  return settings;
}

/// Whether the line is read as the values that it was made of.
bool keeps(const std::string& line, const std::vector<std::string>& values) {
  std::istringstream again(line);
  try {
    const std::vector<CLI::ConfigItem> items = StrictToml().from_config(again);
    return items.size() == 1 && items.front().inputs == values;
  } catch (const CLI::ConfigError&) {
    return false;
  }
}

/// @throws UserError  CLI11's TOML has no escapes: it would read some texts, such as a folder's name with a # in it, as
/// others. What is no UTF-8 is no TOML, nor can the metadata of a checkpoint hold it
void write(std::ostream& out, const Flag& flag) {
  if (flag.text().empty()) {  // open
    return;
  }
  const std::string line = flag.name() + " = " + CLI::detail::ini_join(flag.values());
  if (!keeps(line, flag.values()) || !is_utf8(flag.text())) {
    throw UserError("--" + flag.name() + ": '" + printable(flag.text()) + "' cannot be kept in config.toml" +
                    (is_utf8(flag.text()) ? "" : ", which is UTF-8: give the folder a link with another name"));
  }
  out << line << '\n';
}

}  // namespace

std::string to_toml(const RunSettings& settings) {
  RunSettings bound = settings;
  const Declaration declared(bound);
  std::ostringstream out;
  out << "# Settings of a run of m2teacher, as `m2teacher pretrain --config FILE` takes them.\n";
  for (const Flag& flag : declared.root_flags()) {
    write(out, flag);
  }
  out << "\n[" << kSection << "]\n";
  std::string group;
  for (const Flag& flag : declared.run_flags()) {
    if (flag.group != group) {
      out << (group.empty() ? "" : "\n") << "# " << flag.group << '\n';
      group = flag.group;
    }
    write(out, flag);
  }
  return out.str();
}

RunSettings parse_toml(const std::string& text, const std::string& file) {
  std::istringstream stream(text);
  return parse(stream, file);
}

RunSettings read_config(const std::filesystem::path& path) {
  refuse_irregular(path);
  errno = 0;
  std::ifstream stream(path);
  const bool empty = stream.peek() == std::ifstream::traits_type::eof();
  const auto check = [&] {
    if (!stream.is_open() || stream.bad()) {
      throw UserError(path.string() + ": cannot be read: " + std::strerror(errno != 0 ? errno : EIO));
    }
  };
  check();
  if (empty) {
    throw UserError(path.string() + ": is empty");
  }
  RunSettings settings = parse(stream, path.string());  // no more of it than a sound one can have
  check();
  return settings;
}

std::vector<NamedValue> fixed_settings(const RunSettings& settings) {
  RunSettings bound = settings;
  const Declaration declared(bound);
  std::vector<NamedValue> fixed;
  for (const Flag& flag : declared.run_flags()) {
    if (!flag.changeable) {
      fixed.push_back({flag.name(), flag.text()});
    }
  }
  return fixed;
}

}  // namespace m2teacher
