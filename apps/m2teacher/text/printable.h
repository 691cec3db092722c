#pragma once

#include <string>
#include <string_view>

namespace m2teacher {

/// Whether the text is UTF-8, which names of files need not be.
bool is_utf8(std::string_view text);

/// The text as a terminal may show it: control characters, which could change more than a line, and what is no UTF-8
/// become "\xNN".
std::string printable(std::string_view text);

/// The text as one word of a command line that can be pasted into a shell.
std::string shell_word(const std::string& text);

}  // namespace m2teacher
