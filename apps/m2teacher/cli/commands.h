#pragma once

#include <CLI/App.hpp>

#include <cstdint>
#include <optional>

namespace m2teacher {

// Each adds commands with their options to the program; they run when the command line has been read.

/// @param threads  the program's --threads, where it was given
void add_pretrain(CLI::App& program, const std::optional<int64_t>& threads);

/// knn, linear, features, compare, neighbours
void add_evaluations(CLI::App& program);

/// export, info
void add_checkpoint_tools(CLI::App& program);

void add_time_layers(CLI::App& program);

}  // namespace m2teacher
