#pragma once

#include <string>
#include <vector>

namespace m2teacher {

/// A table in Markdown, its columns padded so that it reads well in a terminal too. The first row is the head;
/// the first column is flush left, the others flush right.
std::string format_table(const std::vector<std::vector<std::string>>& rows);

/// A number with so many digits after the point.
std::string format_number(double value, int digits);

}  // namespace m2teacher
