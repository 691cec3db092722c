#pragma once

#include <CLI/App.hpp>

#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

namespace m2teacher {

/// Numbers that an option takes, both ends included.
template <typename Number>
struct Range {
  Number low;
  Number high = std::numeric_limits<Number>::max();  ///< none
};

/// The plain number in a variable that may be optional.
template <typename Value>
struct PlainNumber {
  using Type = Value;
};
template <typename Value>
struct PlainNumber<std::optional<Value>> {
  using Type = Value;
};

template <typename Value>
using RangeOf = Range<std::conditional_t<std::is_floating_point_v<typename PlainNumber<Value>::Type>, double, int64_t>>;

/// An option of a command whose value can be read and set by its name, as text: what the command line takes and what
/// config.toml holds.
struct Flag {
  CLI::Option* option;
  std::string group;
  std::function<std::vector<std::string>()> values;  ///< the current ones; empty: open
  std::function<void(const std::vector<std::string>&)> set;
  bool changeable = false;  ///< a run that is resumed may have another value

  /// Without dashes.
  std::string name() const { return option->get_single_name(); }
  bool given() const { return option->count() > 0; }
  /// The values, separated by commas.
  std::string text() const;
};

/// Declares options of a command, bound to the variables that hold their values, and remembers them in their order.
class Flags {
 public:
  explicit Flags(CLI::App& app) : app_(&app) {}

  /// Heads the options that follow in --help and in config.toml.
  void group(const std::string& name) { group_ = name; }

  // Each refuses what is out of range in words that name the option, what came and what is allowed. What a variable
  // holds now is the default; a description ends with its source.

  /// @tparam Value  int64_t, int, uint64_t, double, or an optional int64_t or double, which is open while it is unset
  /// @param open    what --help shows where it is open: what it depends on
  template <typename Value>
  void number(const std::string& name, Value& value, RangeOf<Value> range, const std::string& description,
              const std::string& open = "");
  /// A list, separated by commas, of `least` to `most` numbers.
  void numbers(const std::string& name, std::vector<int64_t>& value, Range<int64_t> range, size_t least, size_t most,
               const std::string& description);
  /// One number per view.
  void pair(const std::string& name, double& first, double& second, Range<double> range,
            const std::string& description);
  void flag(const std::string& name, bool& value, const std::string& description);
  /// What `parse` takes and `text` gives back. `parse` throws UserError.
  template <typename Value>
  void word(const std::string& name, const std::string& type, Value& value, Value (*parse)(const std::string&),
            std::string (*text)(const Value&), const std::string& description) {
    add(
        name, type, 1, 1, [&value, parse](const std::vector<std::string>& texts) { value = parse(texts.front()); },
        [&value, text] { return std::vector<std::string>{text(value)}; },
        check_by([parse](const std::string& given) { parse(given); }), description);
  }
  /// The last option that was declared may be another when a run is resumed.
  void changeable() { flags_.back().changeable = true; }
  CLI::Option* last() { return flags_.back().option; }

  /// Takes over the values of those options that were given.
  /// @param given  declares the same options
  void set_given(const Flags& given) const;

  const std::vector<Flag>& all() const { return flags_; }

 private:
  using Texts = std::vector<std::string>;

  /// A validator that refuses what `parse` throws a UserError at.
  static CLI::Validator check_by(std::function<void(const std::string&)> parse);
  CLI::Option* add(const std::string& name, const std::string& type, size_t least, size_t most,
                   std::function<void(const Texts&)> set, std::function<Texts()> values, CLI::Validator check,
                   const std::string& description);

  CLI::App* app_;
  std::string group_ = "Options";
  std::vector<Flag> flags_;
};

}  // namespace m2teacher
