#include "settings/flags.h"

#include "error.h"
#include "text/parse_number.h"

#include <CLI/CLI.hpp>

#include <array>
#include <charconv>
#include <utility>

namespace m2teacher {
namespace {

using Texts = std::vector<std::string>;

std::string text_of(int64_t value) { return std::to_string(value); }

/// The shortest text that gives the same number back.
std::string text_of(double value) {
  std::array<char, 32> text{};
  const auto end = std::to_chars(text.begin(), text.end(), value);
  return {text.data(), end.ptr};
}

template <typename Number>
std::string text_of(const Range<Number>& range) {
  const bool open = range.high == std::numeric_limits<Number>::max();
  return text_of(range.low) + (open ? " or more" : " to " + text_of(range.high));
}

/// A number that was checked before.
template <typename Number>
Number number_of(const std::string& text) {
  return parse_number<Number>(text).value_or(Number{});
}

template <typename Number>
CLI::Validator check_range(Range<Number> range) {
  return {[range](std::string& text) {
            const auto value = parse_number<Number>(text);
            const bool fine = value && *value >= range.low && *value <= range.high;
            return fine ? std::string() : "got " + text + ", expected " + text_of(range);
          },
          text_of(range)};
}

std::string joined(const Texts& texts) {
  std::string line;
  for (const std::string& text : texts) {
    line += (line.empty() ? "" : ",") + text;
  }
  return line;
}

}  // namespace

std::string Flag::text() const { return joined(values()); }

CLI::Validator Flags::check_by(std::function<void(const std::string&)> parse) {
  return {[parse = std::move(parse)](std::string& text) -> std::string {
            try {
              parse(text);
              return {};
            } catch (const UserError& error) {
              // CLI11 puts the option's name before it, as the error itself does.
              const std::string words = error.what();
              const size_t colon = words.find(": ");
              return words.starts_with("--") && colon != std::string::npos ? words.substr(colon + 2) : words;
            }
          },
          ""};
}

CLI::Option* Flags::add(const std::string& name, const std::string& type, size_t least, size_t most,
                        std::function<void(const Texts&)> set, std::function<Texts()> values, CLI::Validator check,
                        const std::string& description) {
  CLI::Option* option = app_->add_option(
      name,
      [set](const CLI::results_t& results) {
        set(results);
        return true;
      },
      description);
  option->type_name(type)->group(group_)->check(std::move(check))->default_str(joined(values()));
  if (most > 1) {
    option->delimiter(',')->expected(static_cast<int>(least), static_cast<int>(most));
    // CLI11's own text would add how many times.
    option->option_text(option->get_type_name() + "=" + option->get_default_str());
  }
  flags_.push_back({.option = option, .group = group_, .values = std::move(values), .set = std::move(set)});
  return option;
}

template <typename Value>
void Flags::number(const std::string& name, Value& value, RangeOf<Value> range, const std::string& description,
                   const std::string& open) {
  using Number = PlainNumber<Value>::Type;
  using Wide = decltype(range.low);
  const auto set = [&value](const Texts& texts) { value = static_cast<Number>(number_of<Wide>(texts.front())); };
  const auto values = [&value]() -> Texts {
    if constexpr (std::is_same_v<Value, Number>) {
      return {text_of(static_cast<Wide>(value))};
    } else {
      return value ? Texts{text_of(*value)} : Texts{};
    }
  };
  const char* type = std::is_floating_point_v<Number> ? "X" : "N";
  CLI::Option* option = add(name, type, 1, 1, set, values, check_range(range), description);
  if (values().empty()) {
    option->default_str(open);
  }
}

template void Flags::number(const std::string&, int64_t&, RangeOf<int64_t>, const std::string&, const std::string&);
template void Flags::number(const std::string&, int&, RangeOf<int>, const std::string&, const std::string&);
template void Flags::number(const std::string&, uint64_t&, RangeOf<uint64_t>, const std::string&, const std::string&);
template void Flags::number(const std::string&, double&, RangeOf<double>, const std::string&, const std::string&);
template void Flags::number(const std::string&, std::optional<int64_t>&, RangeOf<int64_t>, const std::string&,
                            const std::string&);
template void Flags::number(const std::string&, std::optional<double>&, RangeOf<double>, const std::string&,
                            const std::string&);

void Flags::numbers(const std::string& name, std::vector<int64_t>& value, Range<int64_t> range, size_t least,
                    size_t most, const std::string& description) {
  const auto set = [&value](const Texts& texts) {
    value.clear();
    for (const std::string& text : texts) {
      value.push_back(number_of<int64_t>(text));
    }
  };
  const auto values = [&value] {
    Texts texts;
    for (const int64_t number : value) {
      texts.push_back(text_of(number));
    }
    return texts;
  };
  add(name, "N,N,...", least, most, set, values, check_range(range), description);
}

void Flags::pair(const std::string& name, double& first, double& second, Range<double> range,
                 const std::string& description) {
  const auto set = [&first, &second](const Texts& texts) {
    first = number_of<double>(texts.front());
    second = number_of<double>(texts.back());
  };
  add(
      name, "X,X", 2, 2, set, [&first, &second] { return Texts{text_of(first), text_of(second)}; }, check_range(range),
      description);
}

void Flags::flag(const std::string& name, bool& value, const std::string& description) {
  CLI::Option* option = app_->add_flag(name, value, description)->group(group_);
  flags_.push_back({.option = option,
                    .group = group_,
                    .values = [&value] { return Texts{value ? "true" : "false"}; },
                    .set = [&value](const Texts& texts) { value = texts.front() == "true"; }});
}

void Flags::set_given(const Flags& given) const {
  for (size_t i = 0; i < flags_.size(); ++i) {
    if (given.flags_[i].given()) {
      flags_[i].set(given.flags_[i].values());
    }
  }
}

}  // namespace m2teacher
