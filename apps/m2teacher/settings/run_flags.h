#pragma once

#include "settings/flags.h"
#include "settings/run_settings.h"

namespace m2teacher {

/// The program's `--threads`. What it holds is applied by whoever runs the command.
void add_threads_flag(Flags& flags, std::optional<int64_t>& threads);

void add_data_flags(Flags& flags, DataOptions& data);
void add_recipe_flags(Flags& flags, PretrainOptions& recipe);
void add_seed_flag(Flags& flags, uint64_t& seed);

/// All options of pretrain that are settings of the run, bound to `settings`.
void add_run_flags(Flags& flags, RunSettings& settings);

/// Explains the sources that descriptions of options name.
inline constexpr const char* kSources =
    "Where defaults come from:\n"
    "  paper           Momentum^2 Teacher, arXiv 2101.07525, section 4.1\n"
    "  published code  github.com/zengarden/momentum2-teacher: exps/arxiv, data/transforms.py\n"
    "  BYOL            arXiv 2006.07733, appendix B, which the paper follows\n"
    "  ours            chosen here\n";

}  // namespace m2teacher
