"""The package as users get it: installed by pip or by CMake, used from another folder and another project."""

from __future__ import annotations

import re
import subprocess
import venv
from pathlib import Path

from installation import SOURCE, build_consumer, readme_snippet, run

SYSTEM_LIBRARIES = {"ld-linux", "libc", "libm", "libgcc_s", "libgomp", "libstdc++"}
TORCH_LIBRARIES = {"libtorch", "libtorch_cpu", "libc10"}


def test_pip_install_imports_away_from_the_source_tree(installed_python: Path, tmp_path: Path) -> None:
    code = """
        import momentum_bn, torch
        layer = momentum_bn.MomentumBatchNorm2d(3)
        assert layer(torch.rand(2, 3, 4, 4)).shape == (2, 3, 4, 4)
        print(momentum_bn.__file__, torch.__file__)
    """
    module, _ = run(installed_python, "-c", "if True:" + code, cwd=tmp_path).split()
    assert Path(module).is_relative_to(installed_python.parents[1])


def test_metadata(installed_python: Path, tmp_path: Path) -> None:
    code = """
        import importlib.metadata as metadata, momentum_bn
        print(metadata.version("momentum-bn"), momentum_bn.__version__)
        print(metadata.metadata("momentum-bn")["License-Expression"])
        print(*(line for line in metadata.requires("momentum-bn") if "extra ==" not in line))
    """
    versions, licence, requirements = run(installed_python, "-c", "if True:" + code, cwd=tmp_path).splitlines()
    project_version = re.search(
        r"project\(\s*momentum_bn\s+VERSION\s+([0-9.]+)", (SOURCE / "CMakeLists.txt").read_text()
    )
    assert project_version
    assert versions.split() == [project_version.group(1)] * 2
    assert licence == "BSD-3-Clause"
    assert requirements == "torch>=2.11"


def test_wheel_links_torch_alone(installed_python: Path) -> None:
    (library,) = installed_python.parents[1].rglob("libmomentum_bn.so")
    needed = set(re.findall(r"\(NEEDED\).*\[(ld-linux|[^.]+)\S*\]", run("readelf", "--dynamic", library)))
    assert needed & TORCH_LIBRARIES
    assert needed <= TORCH_LIBRARIES | SYSTEM_LIBRARIES


def test_build_without_torch_names_the_way_out(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    result = subprocess.run(
        [
            *("cmake", "-G", "Ninja", "-S", SOURCE, "-B", tmp_path / "build"),
            f"-DPython_EXECUTABLE={tmp_path}/bare/bin/python",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "--no-build-isolation" in result.stderr


def test_readme_python(installed_python: Path, tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(readme_snippet("python"))
    run(installed_python, "-W", "error", "snippet.py", cwd=tmp_path)


def test_readme_cpp_with_cmake_install(install_prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "snippet.cpp").write_text(readme_snippet("cpp"))
    run(build_consumer(tmp_path / "snippet.cpp", install_prefix, tmp_path / "build"))


def test_consumer_of_the_wheel(installed_python: Path, tmp_path: Path) -> None:
    prefix = run(
        installed_python, "-c", "import momentum_bn; print(momentum_bn.cmake_prefix_path)", cwd=tmp_path
    ).strip()
    assert Path(prefix).is_relative_to(installed_python.parents[1])
    source = Path(__file__).parent / "consumer" / "main.cpp"
    run(build_consumer(source, Path(prefix), tmp_path / "build"))
