#pragma once

#include "distributed/ranks.h"

#include <CLI/App.hpp>

#include <cstdint>
#include <functional>
#include <optional>

namespace m2teacher {

// Each adds commands with their options to the program; they run when the command line has been read.

/// @param threads  the program's --threads, where it was given
/// @param work     filled with what is to be done when all ranks have read their command lines
void add_pretrain(CLI::App& program, const std::optional<int64_t>& threads, const Ranks& ranks,
                  std::function<void()>& work);

/// knn, linear, features, compare, neighbours
void add_evaluations(CLI::App& program);

/// export, info
void add_checkpoint_tools(CLI::App& program);

void add_time_layers(CLI::App& program);

}  // namespace m2teacher
