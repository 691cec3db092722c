#include "output/table.h"

#include <algorithm>
#include <iomanip>
#include <sstream>

namespace m2teacher {

std::string format_table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths(rows.front().size(), 0);
  for (const auto& row : rows) {
    for (size_t column = 0; column < row.size(); ++column) {
      widths[column] = std::max(widths[column], row[column].size());
    }
  }
  std::ostringstream text;
  for (size_t r = 0; r < rows.size(); ++r) {
    for (size_t column = 0; column < rows[r].size(); ++column) {
      text << "| " << (column == 0 ? std::left : std::right) << std::setw(static_cast<int>(widths[column]))
           << rows[r][column] << ' ';
    }
    text << "|\n";
    if (r == 0) {
      for (size_t column = 0; column < widths.size(); ++column) {
        text << "| " << std::string(widths[column] - 1, '-') << (column == 0 ? '-' : ':') << ' ';
      }
      text << "|\n";
    }
  }
  return text.str();
}

std::string format_number(double value, int digits) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(digits) << value;
  return text.str();
}

}  // namespace m2teacher
