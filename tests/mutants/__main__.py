"""Plants faults one at a time and sees that their tests fail: python -m tests.mutants [WORD ...].

With words, only faults whose file, test or target has one of them. A copy of the tree in build/mutants is changed and
built; tests of Python code run with the library of build/.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from .faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
TREE = ROOT / "build/mutants"
BUILD = TREE / "build"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]

# An editable install finds its package before PYTHONPATH is looked at.
SITE = """import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
"""

CAUGHT, MISSED, BROKEN = "caught", "MISSED", "BROKEN"


def copy_tree() -> None:
    """Brings the copy up to date; files that are the same keep their times, so that little is compiled again."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        source, target = ROOT / name, TREE / name
        if not source.exists() or (target.exists() and target.read_bytes() == source.read_bytes()):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    (TREE / "site").mkdir(exist_ok=True)
    (TREE / "site/sitecustomize.py").write_text(SITE)
    if not (TREE / ".venv").exists() and (ROOT / ".venv").exists():
        (TREE / ".venv").symlink_to(ROOT / ".venv")


def quietly(command: list[object], **variables: object) -> tuple[int, str]:
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    result = subprocess.run(
        list(map(str, command)), cwd=TREE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return result.returncode, result.stdout


def build(target: str) -> tuple[int, str]:
    if not (BUILD / "build.ninja").exists():
        python = TREE / ".venv/bin/python" if (TREE / ".venv").exists() else sys.executable
        code, output = quietly(["cmake", "--preset", "release", f"-DPython_EXECUTABLE={python}"])
        if code != 0:
            return code, output
    return quietly(["cmake", "--build", BUILD, "--target", target])


def test(fault: Fault) -> tuple[int, str]:
    if fault.builds.endswith("_test"):
        return quietly([BUILD / "bin" / fault.builds, "--gtest_brief=1", f"--gtest_filter={fault.test}"])
    built = BUILD if fault.builds else ROOT / "build"
    return quietly(
        [*PYTEST, fault.test],
        PYTHONPATH=f"{TREE / 'python'}:{TREE / 'site'}",
        MOMENTUM_BN_LIBRARY=built / "lib/libmomentum_bn.so",
        M2TEACHER=built / "bin/m2teacher",
        OMP_WAIT_POLICY="passive",
    )


def verdict(fault: Fault) -> tuple[str, str]:
    """What became of a planted fault, and what the build or the test said."""
    path = TREE / fault.file
    sound = path.read_text()
    if sound.count(fault.old) != 1:
        return BROKEN, f"{fault.file} holds {sound.count(fault.old)} times: {fault.old}"
    path.write_text(sound.replace(fault.old, fault.new))
    try:
        if fault.builds:
            code, output = build(fault.builds)
            if code != 0:
                return BROKEN, output
        code, output = test(fault)
    finally:
        path.write_text(sound)
    # pytest ends with 1 where a test failed, with more where it could not run one. A fault may also crash the process.
    seen = code == 1 or code < 0
    return (CAUGHT if seen else MISSED if code == 0 else BROKEN), output


def main(words: list[str]) -> int:
    copy_tree()
    chosen = [fault for fault in FAULTS if not words or any(word in " ".join(fault) for word in words)]
    verdicts = []
    for fault in chosen:
        start = time.monotonic()
        found, output = verdict(fault)
        verdicts.append(found)
        first_line = next(filter(None, map(str.strip, fault.old.splitlines())))
        print(f"{found}  {fault.file}: {first_line}  [{fault.test}]  {time.monotonic() - start:.0f} s", flush=True)
        if found != CAUGHT:
            print(output[-2000:], flush=True)
    print(f"{verdicts.count(CAUGHT)} of {len(chosen)} caught")
    return 0 if verdicts.count(CAUGHT) == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
