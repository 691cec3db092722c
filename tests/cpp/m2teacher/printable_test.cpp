#include "text/printable.h"

#include "temporary_folder.h"

#include <gtest/gtest.h>

#include <array>
#include <cstdio>
#include <vector>

namespace m2teacher {
namespace {

const std::vector<std::string> kUtf8 = {"", "plain", "\xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80", "\xed\x9f\xbf",
                                        "\xf4\x8f\xbf\xbf"};
// Latin-1, cut short, longer than need be, a surrogate, beyond the last character, stray bytes.
const std::vector<std::string> kOther = {"im\xe4ges",    "\xe2\x82",         "\xc0\xaf", "\xe0\x80\xaf",
                                         "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xff",     "a\x80"};

TEST(Printable, KnowsUtf8) {
  for (const std::string& text : kUtf8) {
    EXPECT_TRUE(is_utf8(text)) << text;
    EXPECT_EQ(printable(text), text);
  }
  for (const std::string& text : kOther) {
    EXPECT_FALSE(is_utf8(text)) << printable(text);
  }
}

TEST(Printable, EscapesWhatATerminalWouldDo) {
  EXPECT_EQ(printable("a\x1b[2Jb\x07\n\x7f"), "a\\x1b[2Jb\\x07\\x0a\\x7f");
  EXPECT_EQ(printable("\xc2\x9b"
                      "31m"),
            "\\xc2\\x9b31m");  // an escape sequence in one character
  EXPECT_EQ(printable("im\xe4ges"), "im\\xe4ges");
}

TEST(ShellWord, StaysAsItIsWhereAShellHasNothingToSay) { EXPECT_EQ(shell_word("/a/B-1_2.x:y"), "/a/B-1_2.x:y"); }

TEST(ShellWord, IsWhatAShellTakesForTheText) {
  std::vector<std::string> texts = {"",
                                    " ",
                                    "my projects (\xc3\xbc)",
                                    "it's",
                                    "$HOME `x` \"y\" \\ !",
                                    "~",
                                    "a*?[b]",
                                    "-x",
                                    "a\nb",
                                    "\x1b[2J",
                                    "i'm\\ \xe4"
                                    "a"};
  texts.insert(texts.end(), kUtf8.begin(), kUtf8.end());
  texts.insert(texts.end(), kOther.begin(), kOther.end());
  const TemporaryFolder folder;
  for (const std::string& text : texts) {
    EXPECT_EQ(shell_word(text).find('\n'), std::string::npos);
    EXPECT_EQ(printable(shell_word(text)), shell_word(text));
    write_bytes(folder / "script", "printf %s " + shell_word(text) + " >'" + (folder / "out").string() + "'\n");
    ASSERT_EQ(std::system(("bash '" + (folder / "script").string() + "'").c_str()), 0);
    EXPECT_EQ(read_bytes(folder / "out"), text) << shell_word(text);
  }
}

}  // namespace
}  // namespace m2teacher
