"""The recipes in examples/, run by the commands in their README and held to what they print."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from oracle import PublishedFormulas

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
README = (EXAMPLES / "README.md").read_text()
# The recipes of the table, with their commands; those without one have a code block of commands.
COMMANDS = dict(re.findall(r"^\| \[[^]]*\]\(([^)]*)\) \|.*\| (?:`([^`]*)`|see below) \|$", README, re.MULTILINE))
# What a recipe says last, after its own checks.
LAST_LINES = {
    "accumulation_and_crops.py": r"after 40 steps: learning rate 0\.0000, param_momentum 1\.0000, .*layers 0\.0000",
    "ddp_teacher.py": r"step +60  loss \d\.\d+",
    "lightning_resume.py": r"the same bits in all \d+ tensors of student, predictor and teacher",
    "lightly_byol.py": r"epoch 2  loss -0\.\d+",
    "timm_teacher.py": r"regnetx_002: 44 Momentum BatchNorms in the teacher, 44 of them do more in their pass",
    "flame_import.py": r"checkpoints .*",
    "teacher_to_batchnorm.py": r"convert_momentum_batchnorm: same outputs after loading a BatchNorm checkpoint.*",
    "onnx_deployment.py": r"batch of 33: largest difference to torch .*",
    "safetensors_checkpoint.py": r"the same bits in all \d+ tensors of the teacher",
}
# What recipes import that is not to be had for every build of torch.
NEEDED = {"lightly_byol.py": ["torchvision", "lightly"], "timm_teacher.py": ["torchvision", "timm"]}


def run(commands: str, folder: Path) -> str:
    """Runs shell commands in a folder where `examples` and `python` are what README's reader has."""
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(EXAMPLES)
    environment = dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    environment.setdefault("CMAKE_CXX_COMPILER_LAUNCHER", shutil.which("ccache") or "")
    result = subprocess.run(
        ["bash", "-euc", commands],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_readme_lists_every_recipe() -> None:
    recipes = {path.name for path in EXAMPLES.iterdir() if path.name not in ("README.md", "__pycache__")}
    assert set(COMMANDS) == recipes
    assert {name for name, command in COMMANDS.items() if command} == {*LAST_LINES, "byol_teacher.py"}


@pytest.mark.parametrize("recipe", LAST_LINES)
def test_recipe(recipe: str, tmp_path: Path) -> None:
    for package in NEEDED.get(recipe, []):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{recipe} needs {package}, which is not installed")
    last_line = run(COMMANDS[recipe], tmp_path).splitlines()[-1]
    assert re.fullmatch(LAST_LINES[recipe], last_line), last_line


def test_byol_learns_and_resumes(tmp_path: Path) -> None:
    command = COMMANDS["byol_teacher.py"] + " --steps 200"
    output = run(f"{command} --checkpoint whole.pt", tmp_path)
    raw, untrained, trained = (float(percent) for percent in re.findall(r": ([0-9.]+)%", output))
    assert trained > max(raw, untrained) + 2
    run(f"{command} --stop-at 90 --checkpoint half.pt", tmp_path)
    assert (
        run(f"{command} --resume half.pt --checkpoint resumed.pt", tmp_path).splitlines()[-3:]
        == (output.splitlines()[-3:])
    )
    whole, resumed = (torch.load(tmp_path / name) for name in ("whole.pt", "resumed.pt"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


class _PublishedLayer(torch.nn.Module):
    """The published arithmetic behind the constructor that flame documents."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 1.0,
        affine: bool = True,
        track_running_stats: bool = True,
        total_iters: int = 100,
    ) -> None:
        super().__init__()
        assert momentum == 1.0 and affine and track_running_stats
        self.formulas = PublishedFormulas(num_features, total_iters, eps)
        self.weight = torch.nn.Parameter(torch.ones(num_features))
        self.bias = torch.nn.Parameter(torch.zeros(num_features))
        self.total_iters = total_iters

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.formulas.total_iters = self.total_iters
        self.formulas.weight, self.formulas.bias = self.weight, self.bias
        return self.formulas(x)


def test_flame_code_gives_the_same_numbers_by_either_import(monkeypatch: pytest.MonkeyPatch) -> None:
    source = (EXAMPLES / "flame_import.py").read_text()
    flame_import = re.search(r"^# Was: (from flame.*)$", source, re.MULTILINE)
    assert flame_import
    for name in ("flame", "flame.pytorch", "flame.pytorch.nn", "flame.pytorch.nn.momentum_bn"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    published = sys.modules["flame.pytorch.nn.momentum_bn"]
    published.MomentumBatchNorm1d = type("MomentumBatchNorm1d", (_PublishedLayer,), {})
    published.MomentumBatchNorm2d = type("MomentumBatchNorm2d", (_PublishedLayer,), {})

    losses = []
    for text in (source, re.sub(r"^from momentum_bn import .*$", flame_import.group(1), source, flags=re.MULTILINE)):
        recipe: dict = {"__name__": "recipe"}
        exec(compile(text, "flame_import.py", "exec"), recipe)
        losses.append(recipe["train"](30, 0))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0] / 2


def test_cpp_consumer(tmp_path: Path) -> None:
    commands = re.search(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert commands
    output = run(commands.group(1), tmp_path)
    assert output.splitlines()[-1] == "the resumed run is the same, bit for bit"
