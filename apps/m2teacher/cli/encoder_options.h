#pragma once

#include "models/branch.h"

#include <CLI/App.hpp>

#include <filesystem>

namespace m2teacher {

/// --checkpoint: which one a command reads.
void add_checkpoint(CLI::App& command, std::filesystem::path& checkpoint);

/// --network: which of its two encoders.
void add_network(CLI::App& command, BranchImpl::Side& side);

}  // namespace m2teacher
