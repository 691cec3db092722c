#pragma once

#include "error.h"

#include <array>
#include <string>
#include <utility>

namespace m2teacher {

/// The words by which users know the enumerators of `Enum`.
template <typename Enum, size_t N>
using Words = std::array<std::pair<Enum, const char*>, N>;

template <typename Enum, size_t N>
std::string word_of(const Words<Enum, N>& words, Enum value) {
  for (const auto& [candidate, word] : words) {
    if (candidate == value) {
      return word;
    }
  }
  return "unknown";
}

/// @param name  of the option, for the error
/// @throws UserError  no such word
template <typename Enum, size_t N>
Enum parse_word(const std::string& name, const Words<Enum, N>& words, const std::string& text) {
  std::string allowed;
  for (const auto& [value, word] : words) {
    if (text == word) {
      return value;
    }
    allowed += (allowed.empty() ? "" : ", ") + std::string(word);
  }
  throw UserError(name + ": got '" + text + "', expected one of " + allowed);
}

}  // namespace m2teacher
