#pragma once

#include "data/data_options.h"
#include "training/options.h"

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

namespace m2teacher {

/// Everything that a run of pretrain is told, but for where it goes: what config.toml holds.
struct RunSettings {
  std::optional<int64_t> threads;  ///< of the networks' arithmetic; unset: as many as torch takes by itself
  DataOptions data;
  PretrainOptions recipe;
  int64_t eval_every = 250;        ///< steps between two measurements of the teacher's accuracy; 0: none
  int64_t checkpoint_every = 500;  ///< steps between two checkpoints; one is saved at the end, too
  double process_timeout = 1800;   ///< seconds that a process waits for the others
  int64_t keep = 3;                ///< checkpoints kept in the run's folder
};

/// All settings with their values in TOML, as `--config` takes them.
/// @throws UserError  a text in them that CLI11's TOML cannot hold
std::string to_toml(const RunSettings& settings);

/// @param file  named in errors
/// @throws UserError  no TOML, an unknown name, a value that is out of range
RunSettings parse_toml(const std::string& text, const std::string& file);

/// Reads a config.toml. @throws UserError
RunSettings read_config(const std::filesystem::path& path);

/// One setting of a run, by the name of its option.
struct NamedValue {
  std::string name;
  std::string value;
};

/// The settings that a run keeps to its end, so that those of two runs can be compared. Open ones have an empty value.
std::vector<NamedValue> fixed_settings(const RunSettings& settings);

}  // namespace m2teacher
