"""Faults to plant, one at a time, each with the test that must see it."""

from typing import NamedTuple

PYTHON = "tests/python"
TRAINER = "tests/python/m2teacher"


class Fault(NamedTuple):
    """A change of one place in one file."""

    file: str
    old: str
    """Occurs once in the file."""
    new: str
    test: str
    """Of pytest; or what a C++ program of tests takes as its filter."""
    builds: str = ""
    """The target that is built and used: a library, the trainer, or a program of tests. Empty: Python alone."""


TEACHER = "python/momentum_bn/teacher.py"
LAYER = "python/momentum_bn/momentum_batch_norm.py"
PLAN = "python/momentum_bn/_plan.py"
FUSE = "python/momentum_bn/fuse.py"
RULES = "src/kernels/channel_rules.h"
PREFETCHER = "apps/m2teacher/data/prefetcher.h"

FAULTS = [
    # The teacher.
    Fault(
        TEACHER,
        "self._forwards += 1",
        "self._forwards += 2",
        f"{PYTHON}/test_teacher.py::test_schedule_in_pace_needs_no_words",
    ),
    Fault(
        TEACHER,
        "[_shard_of(masters.get(name, none_needed)) for name, _ in named]",
        "[none_needed for _ in named]",
        f"{PYTHON}/test_teacher.py::test_sixteen_bit_student_has_a_float32_master",
    ),
    Fault(
        TEACHER,
        "        self.updates.zero_()\n",
        "",
        f"{PYTHON}/test_teacher.py::test_reset_starts_both_schedules_anew",
    ),
    Fault(
        TEACHER,
        "layer.total_iters = self._total_iters",
        "pass",
        f"{PYTHON}/test_teacher.py::test_total_iters_may_be_assigned",
    ),
    Fault(TEACHER, "norm.eval()", "pass", f"{PYTHON}/test_teacher_fused.py::test_norms_stay_in_evaluation_mode"),
    Fault(
        TEACHER,
        "norm.num_batches_tracked.copy_(their_norm.num_batches_tracked)",
        "pass",
        f"{PYTHON}/test_teacher_fused.py::test_statistics_follow_the_students",
    ),
    Fault(
        TEACHER,
        "copied._copied_with = memo",
        "pass",
        f"{PYTHON}/test_teacher.py::test_in_a_copy_of_the_whole_the_teacher_follows_the_copied_student",
    ),
    Fault(
        TEACHER,
        "_renew_if_stale(_shard_of(master), _shard_of(parameter))",
        "pass",
        f"{PYTHON}/test_teacher.py::test_a_master_is_not_older_than_its_parameter",
    ),
    # The layer's state.
    Fault(
        LAYER,
        "buffers[name] = _at_least_float32(views, buffers[name])",
        "pass",
        f"{PYTHON}/test_state.py::test_casts_keep_sums_of_the_views",
    ),
    Fault(
        LAYER,
        "        if moved.dtype != scalar.dtype:\n            return scalar\n",
        "",
        f"{PYTHON}/test_state.py::test_casts_never_round_schedule_or_counters",
    ),
    Fault(
        LAYER,
        "                if len(error_msgs) == errors_before:\n                    self._forget_views()\n",
        "",
        f"{PYTHON}/test_state.py::test_plain_state_dict_of_torch_loads_strictly",
    ),
    Fault(
        LAYER,
        "            cur_iter.zero_()\n",
        "",
        f"{PYTHON}/test_state.py::test_reset_running_stats_makes_all_state_new",
    ),
    Fault(
        LAYER,
        "buffers[name] = self._scalar_on(mean.device, name, scalar)",
        "pass",
        f"{PYTHON}/test_state.py::test_plain_state_dict_assigned_to_a_layer_on_meta_gives_it_a_new_schedule",
    ),
    Fault(
        "src/ops/normalise/inputs.cpp",
        '    check_array(x, view_var_sum, "view_var_sum");\n',
        "",
        f"{PYTHON}/test_errors.py::test_buffers_replaced_between_calls",
        builds="momentum_bn",
    ),
    # The schedules.
    Fault(
        LAYER,
        "self._untracked_cur_iter += 1",
        "self._untracked_cur_iter += 2",
        f"{PYTHON}/test_modules.py::test_momentum_cosine_decay_without_tracking",
    ),
    Fault(
        RULES,
        "cur_iter < total_iters ? cur_iter : total_iters",
        "cur_iter",
        f"{PYTHON}/test_state.py::test_schedule_stays_at_zero_past_total_iters",
        builds="momentum_bn",
    ),
    Fault(
        "src/layers/schedule.cpp",
        "return 1 - (1 - start) * scheduled_momentum",
        "return start * scheduled_momentum",
        f"{PYTHON}/test_teacher.py::test_averages_follow_the_formula",
        builds="momentum_bn",
    ),
    Fault(
        "apps/m2teacher/training/learning_rate.cpp",
        "static_cast<double>(step + 1)",
        "static_cast<double>(step)",
        f"{TRAINER}/test_commands.py::test_metrics_show_the_schedules_and_a_falling_loss",
        builds="m2teacher",
    ),
    # Fusing.
    Fault(
        PLAN,
        'user is reader or user.meta["kind"] is Kind.METADATA or self._position(user) < position',
        "True",
        f"{PYTHON}/test_fuse.py::test_memory_of_others_is_not_taken",
    ),
    Fault(
        PLAN,
        "return len(x.users) == 1 and self._base(x) is x and is_quiet(x, self._modules)",
        "return True",
        f"{PYTHON}/test_fuse.py::test_memory_under_autograd",
    ),
    Fault(FUSE, "if made.watch.same(module):", "if True:", f"{PYTHON}/test_fuse.py::test_replaced_modules_are_noticed"),
    Fault(FUSE, "        or _has_any_global_hook()\n", "", f"{PYTHON}/test_fuse.py::test_hooks_of_all_modules"),
    Fault(
        PLAN,
        "        and residual.shape == x.shape\n",
        "",
        f"{PYTHON}/test_fuse.py::test_an_addition_that_broadcasts_or_promotes_is_done_as_written",
    ),
    Fault(
        FUSE,
        "return FusedForward(memo.get(id(module)))",
        "return FusedForward(module)",
        f"{PYTHON}/test_fuse.py::test_copies_are_fused_and_their_own",
    ),
    # Kernels.
    Fault(
        RULES,
        "into.m2 += other.m2 + delta * delta * (into.count * share);",
        "into.m2 += other.m2;",
        "*ForwardTest.EverySize*",
        builds="kernels_test",
    ),
    Fault(
        RULES,
        "    case Variance::Published:\n      return n / (n - 1);\n",
        "    case Variance::Published:\n      break;\n",
        "*BlendTest*",
        builds="kernels_test",
    ),
    Fault(
        RULES,
        "const double shift = bias - static_cast<double>(saved.center_rest) * factor;",
        "const double shift = bias;",
        "*ForwardTest*",
        builds="kernels_test",
    ),
    Fault(
        RULES,
        "return {g, gx - static_cast<double>(saved.center_rest) * g};",
        "return {g, gx};",
        "*ThroughStatisticsTest*",
        builds="kernels_test",
    ),
    Fault(
        RULES,
        "weight * normalising_variance_factor(options, n) / (n - 1)",
        "weight * normalising_variance_factor(options, n) / n",
        "*ThroughStatisticsTest*",
        builds="kernels_test",
    ),
    # Distributed.
    Fault(
        PLAN,
        "return not (_has_group(ours) and any(_has_group(inner) for inner in module.modules()))",
        "return True",
        f"{PYTHON}/test_fuse.py::test_the_order_of_collectives_stays",
    ),
    Fault(
        "src/ops/shared/group.cpp",
        "if (ranks_of_process_group(name) == 1) {",
        "if (ranks_of_process_group(name) >= 1) {",
        f"{PYTHON}/test_batch_norm_groups.py",
        builds="momentum_bn",
    ),
    Fault(
        "apps/m2teacher/training/gradient_sum.cpp",
        "entry.passes_left = passes;\n      entry.batches_left = batches;",
        "entry.passes_left = 1;\n      entry.batches_left = batches;",
        f"{TRAINER}/test_several_processes.py::test_a_step_is_that_of_the_formulas",
        builds="m2teacher_python",
    ),
    # Checkpoints.
    Fault(
        "apps/m2teacher/checkpoint/checkpoint.cpp",
        "checkpoint.metrics.loss_sum = take<double>",
        "take<double>",
        f"{TRAINER}/test_runs.py::test_damaged_checkpoints_are_skipped_and_named",
        builds="m2teacher",
    ),
    Fault(
        "apps/m2teacher/checkpoint/safetensors.cpp",
        "if (found.digits() != expected) {",
        "if (false) {",
        f"{TRAINER}/test_bad_input.py::test_no_command_takes_a_damaged_checkpoint",
        builds="m2teacher",
    ),
    Fault(
        "apps/m2teacher/checkpoint/run_folder.cpp",
        "--keep < 0",
        "--keep <= 0",
        f"{TRAINER}/test_runs.py::test_keeps_the_last_checkpoints",
        builds="m2teacher",
    ),
    Fault(
        "apps/m2teacher/output/metrics.cpp",
        "!file_.is_open() || ftruncate(file_.get(), kept) != 0",
        "!file_.is_open()",
        f"{TRAINER}/test_failing_calls.py::test_a_run_that_goes_on[idx-some]",
        builds="m2teacher",
    ),
    # The loader.
    Fault(
        PREFETCHER,
        "(!slot.error || item < slot.error_item)",
        "!slot.error",
        "Prefetcher.ThrowsWhatTheFirstBadItemThrewWithItsBatch",
        builds="prefetcher_test",
    ),
    Fault(
        PREFETCHER,
        "static_cast<int64_t>(slots.size()) > options.batches_ahead",
        "static_cast<int64_t>(slots.size()) > options.batches_ahead + 1",
        "Prefetcher.DoesNotRunAheadFurtherThanAllowed",
        builds="prefetcher_test",
    ),
    Fault(
        PREFETCHER,
        "waited = state_->items_done == seen ? waited + part : std::chrono::duration<double>(0);",
        "waited += part;",
        "Prefetcher.WaitsAsLongAsItemsComeIn",
        builds="prefetcher_test",
    ),
    Fault(
        "apps/m2teacher/data/decode_image.cpp",
        "    case 6:\n      return pixels.transpose(0, 1).flip({1});",
        "    case 6:\n      return pixels.transpose(0, 1).flip({0});",
        f"{TRAINER}/test_image_formats.py::test_is_read_as_pillow_reads_it",
        builds="m2teacher",
    ),
]
