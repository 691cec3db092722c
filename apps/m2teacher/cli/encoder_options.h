#pragma once

#include "models/branch.h"

#include <CLI/App.hpp>

#include <filesystem>
#include <string>

namespace m2teacher {

/// --checkpoint: which one a command reads.
void add_checkpoint(CLI::App& command, std::filesystem::path& checkpoint);

/// --device: where networks compute, in a word that `choose_device` knows.
/// @param meta  what the command does on meta tensors; empty: it cannot
void add_device(CLI::App& command, std::string& device, const std::string& meta = "");

/// --network: which of its two encoders.
void add_network(CLI::App& command, BranchImpl::Side& side);

}  // namespace m2teacher
