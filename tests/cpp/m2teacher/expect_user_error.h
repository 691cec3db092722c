#pragma once

#include "error.h"

#include <gtest/gtest.h>

#include <string>

namespace m2teacher {

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

/// The call must throw a UserError of one line that holds `part`.
template <typename Call>
void expect_user_error(const Call& call, const std::string& part) {
  try {
    call();
    ADD_FAILURE() << "no error, expected one with: " << part;
  } catch (const UserError& error) {
    EXPECT_PRED2(contains, error.what(), part);
    EXPECT_FALSE(contains(error.what(), "\n")) << error.what();
  }
}

}  // namespace m2teacher
