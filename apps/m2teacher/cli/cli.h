#pragma once

#include <string>

namespace m2teacher {

inline constexpr int kExitSuccess = 0;
inline constexpr int kExitFailure = 1;  ///< the command failed: bad data, a bad checkpoint, a full disk
inline constexpr int kExitUsage = 2;    ///< the command line is wrong

/// The program: parses the command line and runs the command. On failure one line goes to stderr.
/// @param process_group  name of the c10d process group whose ranks all call this; empty: this process alone
/// @return the exit code
int run(int argc, const char* const* argv, const std::string& process_group = "");

}  // namespace m2teacher
