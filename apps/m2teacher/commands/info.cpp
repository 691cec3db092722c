#include "commands/info.h"

#include "checkpoint/checkpoint.h"
#include "output/table.h"
#include "text/printable.h"

#include <iostream>
#include <sstream>

namespace m2teacher {
namespace {

constexpr double kBytesPerMegabyte = 1e6;

std::string shape_of(const at::Tensor& tensor) {
  std::ostringstream text;
  text << tensor.sizes();
  return text.str();
}

/// What stands before the first point: student, teacher, optimiser and so on.
std::string part_of(const std::string& name) { return name.substr(0, name.find('.')); }

std::vector<std::vector<std::string>> parts_table(const Checkpoint& checkpoint) {
  struct Part {
    int64_t tensors = 0;
    int64_t values = 0;
    size_t bytes = 0;
  };
  std::map<std::string, Part> parts;
  for (const auto& [name, tensor] : checkpoint.state) {
    Part& part = parts[part_of(name)];
    ++part.tensors;
    part.values += tensor.numel();
    part.bytes += tensor.nbytes();
  }
  std::vector<std::vector<std::string>> rows = {{"part", "tensors", "values", "MB"}};
  for (const auto& [name, part] : parts) {
    rows.push_back({printable(name), std::to_string(part.tensors), std::to_string(part.values),
                    format_number(static_cast<double>(part.bytes) / kBytesPerMegabyte, 3)});
  }
  return rows;
}

std::vector<std::vector<std::string>> tensors_table(const Checkpoint& checkpoint) {
  std::vector<std::vector<std::string>> rows = {{"tensor", "dtype", "shape"}};
  for (const auto& [name, tensor] : checkpoint.state) {
    rows.push_back({printable(name), at::toString(tensor.scalar_type()), shape_of(tensor)});
  }
  return rows;
}

/// As `printable`, of every line.
std::string printable_lines(const std::string& text) {
  std::istringstream lines(text);
  std::string out;
  for (std::string line; std::getline(lines, line);) {
    out += printable(line) + '\n';
  }
  return out;
}

}  // namespace

void run_info(const InfoCommand& command) {
  const Checkpoint checkpoint = open_checkpoint(command.checkpoint, std::cerr);
  std::cout << printable(checkpoint.path.string()) << ": whole, after step " << checkpoint.step() << " of "
            << checkpoint.settings.recipe.steps.value_or(0) << '\n'
            << "trained on " << describe(checkpoint.trained_on) << "\n\n"
            << printable_lines(to_toml(checkpoint.settings)) << '\n'
            << format_table(command.tensors ? tensors_table(checkpoint) : parts_table(checkpoint)) << std::flush;
}

}  // namespace m2teacher
