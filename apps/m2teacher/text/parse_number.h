#pragma once

#include <charconv>
#include <optional>
#include <string_view>
#include <system_error>

namespace m2teacher {

/// The number that is all of the text; none where the text is anything else, or more than the type holds.
template <typename Number>
std::optional<Number> parse_number(std::string_view text) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() ? std::optional(value) : std::nullopt;
}

}  // namespace m2teacher
