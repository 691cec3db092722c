"""Whether a long training grows: resident memory of the demo's training early and late.

Usage: python -m benchmarks.trainer_memory [--steps EARLY LATE] [--data FOLDER] [--binary FILE] [OPTIONS OF PRETRAIN]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .trainer_library import FASHION_MNIST, RECIPE, REPOSITORY

# Steps that are still to come when the late figure is taken.
MARGIN = 100


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer_memory", description=__doc__)
    parser.add_argument("--steps", nargs=2, type=int, default=(500, 5000), metavar=("EARLY", "LATE"))
    parser.add_argument("--data", default=FASHION_MNIST, help="folder with Fashion-MNIST's files")
    parser.add_argument("--binary", type=Path, default=REPOSITORY / "build/bin/m2teacher", help="the trainer")
    options, rest = parser.parse_known_args()
    early, late = resident_mebibytes(options.binary, options.data, options.steps, rest)
    print(f"resident after step {options.steps[0]}: {early:.1f} MiB, after step {options.steps[1]}: {late:.1f} MiB")


def resident_mebibytes(binary: Path, data: str, steps: list[int], rest: list[str]) -> list[float]:
    """Resident memory of a training after these steps, in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [str(binary), "pretrain", "--config", str(RECIPE), "--data", f"idx:{data}", "--out", str(run)]
        command += ["--steps", str(steps[-1] + MARGIN), *rest]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as training:
            try:
                return [_resident_after(step, run / "metrics.csv", training) for step in steps]
            finally:
                training.kill()


def _resident_after(step: int, metrics: Path, training: subprocess.Popen[bytes]) -> float:
    while _last_step(metrics) < step:
        if training.poll() is not None:
            sys.exit(f"the training ended with exit code {training.returncode} before step {step}")
        time.sleep(0.01)
    status = Path(f"/proc/{training.pid}/status").read_text()
    kibibytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return int(kibibytes) / 1024


def _last_step(metrics: Path) -> int:
    """Of the last whole row; 0 while there is none."""
    rows = metrics.read_text().split("\n")[1:-1] if metrics.exists() else []
    return int(rows[-1].split(",")[0]) if rows else 0


if __name__ == "__main__":
    main()
