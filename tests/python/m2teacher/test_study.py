"""The study of momentum, plain BatchNorm and EMAN: a small one from end to end, and what it says of its figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "apps/m2teacher"))
import study

# What the recipe's warm-up needs at the smaller batch.
IMAGES = 1600

SMALL_TRAINER = """#!/bin/sh
echo "$@" >>"{calls}"
case " $* " in
*" --config "*) set -- "$@" --widths 8 --projector-hidden 16 --predictor-hidden 16 --projector-out 8 ;;
*" time-layers "*) set -- "$@" --rounds 1 ;;
esac
exec "{binary}" "$@"
"""


def test_trains_the_same_images_with_each_and_goes_on_where_it_was(binary: Path, data: Path, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    trainer = tmp_path / "small_trainer"
    trainer.write_text(SMALL_TRAINER.format(calls=calls, binary=binary))
    trainer.chmod(0o755)
    out = tmp_path / "study"

    def run() -> str:
        script = str(REPOSITORY / "apps/m2teacher/study.py")
        command = [sys.executable, script, str(out), "--images", str(IMAGES), "--seeds", "1", "--data", f"idx:{data}"]
        result = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"BIN": str(trainer)}, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    printed = run()
    assert printed == (out / "study.md").read_text()
    assert [line.split("|")[1].strip() for line in printed.splitlines()[2:8]] == [
        "Momentum BatchNorm, 16",
        "plain BatchNorm, 16",
        "EMAN, 16",
        "Momentum BatchNorm, 64",
        "plain BatchNorm, 64",
        "EMAN, 64",
    ]
    written = json.loads((out / "study.json").read_text())
    assert written["ms per step"].keys() == {"16", "64"}
    configs = {path.parent.name: path.read_text().splitlines() for path in out.glob("*/config.toml")}
    assert configs.keys() == {f"{norm}-{batch}-0" for norm in study.NORMS for batch in study.BATCHES}
    for batch in (16, 64):
        ours, plain = configs[f"momentum-{batch}-0"], configs[f"batch-{batch}-0"]
        assert [line for line in ours if line not in plain] == ['bn = "momentum"']
        assert f"steps = {IMAGES // batch}" in ours
    # The recipe's 0.1 and 0.97 are for a batch of 32.
    assert "learning-rate = 0.2" in configs["momentum-64-0"]
    assert "param-momentum = 0.9409" in configs["momentum-64-0"]

    # One training is lost, and what was measured of it: the others are only asked whether they are whole.
    calls.write_text("")
    for path in (out / "batch-64-0").iterdir():
        path.unlink()
    assert run() == printed
    again = calls.read_text().splitlines()
    assert sum("--resume" in call for call in again) == 5
    assert sum("--resume" not in call for call in again) == 1 + len(study.MEASURES)


def test_says_whether_a_difference_stands_out() -> None:
    def runs(*accuracies: float) -> list[dict[str, float]]:
        return [dict.fromkeys(study.MEASURES, accuracy) for accuracy in accuracies]

    results = {"momentum-16": runs(81, 82, 83), "batch-16": runs(80, 81, 82.1), "momentum-64": runs(80, 82, 81)}
    results |= {"batch-64": runs(81, 81, 81), "eman-16": runs(80, 82, 83), "eman-64": runs(70, 70, 70)}
    times = {16: {"momentum": 10.0, "batch": 11.0}, 64: {"momentum": 40.0, "batch": 44.26}}
    text = study.report(results, times, images=32000, seeds=3)
    assert "| Momentum BatchNorm, 16 | 82.0 ± 1.0 | 82.0 ± 1.0 | 82.0 ± 1.0 | 10.0 |" in text
    assert "| plain BatchNorm, 64 | 81.0 ± 0.0 | 81.0 ± 0.0 | 81.0 ± 0.0 | 44.3 |" in text
    assert "Batch 16, momentum less plain BatchNorm, seed by seed: kNN +0.97 ± 0.06; kNN shifted" in text
    assert "Batch 64, momentum less plain BatchNorm, seed by seed: kNN +0.00 ± 1.00 (within the spread);" in text
    assert "Batch 64, momentum less EMAN, seed by seed: kNN +11.00 ± 1.00;" in text
    assert "| EMAN, 64 | 70.0 ± 0.0 | 70.0 ± 0.0 | 70.0 ± 0.0 |  |" in text
    with pytest.raises(KeyError):
        study.report({}, times, images=1, seeds=1)
