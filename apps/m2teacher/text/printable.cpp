#include "text/printable.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdint>

namespace m2teacher {
namespace {

// Characters beside letters and digits that mean nothing to a shell.
constexpr std::string_view kPlain = "-_./:=+,@%";

/// Length of the UTF-8 character that the text begins with; 0: it begins with none.
size_t character_length(std::string_view text) {
  const auto byte = [text](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t first = byte(0);
  if (first < 0x80) {
    return 1;
  }
  const size_t length = first >= 0xF0 ? 4 : (first >= 0xE0 ? 3 : 2);
  if (first < 0xC2 || first > 0xF4 || text.size() < length) {
    return 0;
  }
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0U) != 0x80) {
      return 0;
    }
  }
  // Longer than need be, a surrogate, or beyond the last character.
  const uint8_t second = byte(1);
  const bool wrong = (first == 0xE0 && second < 0xA0) || (first == 0xED && second > 0x9F) ||
                     (first == 0xF0 && second < 0x90) || (first == 0xF4 && second > 0x8F);
  return wrong ? 0 : length;
}

bool is_control(std::string_view character) {
  const auto first = static_cast<uint8_t>(character[0]);
  return first < 0x20 || first == 0x7F || (first == 0xC2 && static_cast<uint8_t>(character[1]) < 0xA0);
}

/// @param escaped  characters that get a backslash
std::string with_escapes(std::string_view text, std::string_view escaped) {
  constexpr const char* kHexadecimal = "0123456789abcdef";
  std::string out;
  while (!text.empty()) {
    const size_t length = character_length(text);
    const std::string_view character = text.substr(0, std::max<size_t>(length, 1));
    if (length == 0 || is_control(character)) {
      for (const char part : character) {
        const auto byte = static_cast<uint8_t>(part);
        out += {'\\', 'x', kHexadecimal[byte >> 4U], kHexadecimal[byte & 15U]};
      }
    } else {
      out += escaped.find(character) != std::string_view::npos ? "\\" : "";
      out += character;
    }
    text.remove_prefix(character.size());
  }
  return out;
}

}  // namespace

bool is_utf8(std::string_view text) {
  while (!text.empty()) {
    const size_t length = character_length(text);
    if (length == 0) {
      return false;
    }
    text.remove_prefix(length);
  }
  return true;
}

std::string printable(std::string_view text) { return with_escapes(text, ""); }

std::string shell_word(const std::string& text) {
  if (printable(text) != text) {
    return "$'" + with_escapes(text, "\\'") + "'";
  }
  const bool plain = !text.empty() && std::all_of(text.begin(), text.end(), [](unsigned char c) {
    return (c < 0x80 && std::isalnum(c) != 0) || kPlain.find(static_cast<char>(c)) != std::string_view::npos;
  });
  if (plain) {
    return text;
  }
  std::string quoted = "'";
  for (const char c : text) {
    quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
  }
  return quoted + "'";
}

}  // namespace m2teacher
