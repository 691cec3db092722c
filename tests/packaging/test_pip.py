"""The Python package as users get it: installed by pip, used from another folder."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from installation import (
    CONSUMER,
    SOURCE,
    attempt,
    build_consumer,
    cuda_kernels_line,
    package_folder,
    readme_snippet,
    run,
)

NEEDED = {
    *("libtorch.so", "libtorch_cpu.so", "libc10.so"),
    *("libstdc++.so.6", "libgcc_s.so.1", "libgomp.so.1", "libm.so.6", "libc.so.6"),
}


def test_pip_install_imports_away_from_the_source_tree(installed_python: Path, tmp_path: Path) -> None:
    code = """
        import momentum_bn, torch
        layer = momentum_bn.MomentumBatchNorm2d(3)
        assert layer(torch.rand(2, 3, 4, 4)).shape == (2, 3, 4, 4)
        print(momentum_bn.__file__)
    """
    module = run(installed_python, "-c", "if True:" + code, cwd=tmp_path).strip()
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


def test_library_needs_torch_and_the_cpp_runtime_alone(installed_python: Path) -> None:
    library = package_folder(installed_python) / "lib" / "libmomentum_bn.so"
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "--dynamic", library)))
    assert {name for name in needed if not name.startswith("ld-linux")} == NEEDED


def test_one_openmp_library_in_the_process(installed_python: Path, tmp_path: Path) -> None:
    code = """
        import os, torch, momentum_bn
        momentum_bn.MomentumBatchNorm2d(64)(torch.rand(8, 64, 32, 32))
        with open("/proc/self/maps") as maps:
            print(*{line.split()[-1] for line in maps if "omp" in os.path.basename(line.split()[-1])}, sep="\\n")
    """
    (library,) = run(installed_python, "-c", "if True:" + code, cwd=tmp_path).splitlines()
    assert Path(library).name.startswith("libgomp") and Path(library).parent.match("torch/lib")


def test_config_says_what_gpu_tensors_take(installed_python: Path, tmp_path: Path) -> None:
    config = run(installed_python, "-c", "import momentum_bn; print(momentum_bn.show_config())", cwd=tmp_path)
    assert cuda_kernels_line() in config


def test_readme_python(installed_python: Path, tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(readme_snippet("python"))
    run(installed_python, "-W", "error", "snippet.py", cwd=tmp_path)


def test_consumer_of_the_pip_package(installed_python: Path, tmp_path: Path) -> None:
    """The torch beside the package is found with it: nothing but cmake_prefix_path is given."""
    prefix = run(installed_python, "-c", "import momentum_bn; print(momentum_bn.cmake_prefix_path)", cwd=tmp_path)
    assert Path(prefix.strip()).is_relative_to(installed_python.parents[1])
    run(
        build_consumer(
            tmp_path / "build",
            CONSUMER / "main.cpp",
            CMAKE_PREFIX_PATH=prefix.strip(),
            CMAKE_DISABLE_FIND_PACKAGE_Python="ON",
        )
    )


def test_other_torch_minor_is_refused_before_the_library_is_loaded(installed_python: Path, tmp_path: Path) -> None:
    package = tmp_path / "momentum_bn"
    shutil.copytree(package_folder(installed_python), package, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    (package / "lib").mkdir()
    (package / "lib" / "libmomentum_bn.so").write_text("not a library: must not be loaded")
    record = package / "_build_info.py"
    record.write_text(re.sub(r'TORCH_VERSION = ".*"', 'TORCH_VERSION = "2.12.1"', record.read_text()))
    result = attempt(installed_python, "-c", "import momentum_bn", cwd=tmp_path)
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert re.fullmatch(
        r"ImportError: momentum_bn \S+ was built against torch 2\.12\.1, but torch \S+ is installed\. .*"
        r"pip install --no-build-isolation --force-reinstall --no-deps .*",
        message,
    )


def test_other_torch_patch_is_accepted(installed_python: Path, tmp_path: Path) -> None:
    package = tmp_path / "momentum_bn"
    shutil.copytree(package_folder(installed_python), package, ignore=shutil.ignore_patterns("__pycache__"))
    record = package / "_build_info.py"
    record.write_text(re.sub(r'(TORCH_VERSION = "\d+\.\d+\.)\d+', r"\g<1>99", record.read_text()))
    assert ".99" in record.read_text()
    run(
        installed_python,
        "-c",
        f"import momentum_bn; assert momentum_bn.__file__.startswith({str(tmp_path)!r})",
        cwd=tmp_path,
    )


def test_editable_install(tmp_path: Path) -> None:
    """This environment's own, from `make setup`: Python files of the source tree, the library from the installation."""
    code = """
        import momentum_bn
        print(momentum_bn.__file__)
        print(momentum_bn.cmake_prefix_path)
    """
    result = attempt(sys.executable, "-c", "if True:" + code, cwd=tmp_path)
    if "No module named 'momentum_bn'" in result.stderr:
        pytest.skip(f"momentum_bn is not installed in {sys.prefix}")
    assert result.returncode == 0, result.stderr
    module, prefix = result.stdout.splitlines()
    assert Path(module).is_relative_to(SOURCE / "python")
    assert Path(prefix).is_relative_to(sys.prefix)
    assert (Path(prefix) / "lib" / "cmake" / "momentum_bn" / "momentum_bn-config.cmake").is_file()


def test_build_requires_no_torch() -> None:
    """pip would download one for the build alone, and not the one that the library will run with."""
    requires = re.search(r"^requires = (\[.*\])$", (SOURCE / "pyproject.toml").read_text(), re.MULTILINE)
    assert requires and "scikit-build-core" in requires.group(1) and "torch" not in requires.group(1)


def test_installed_files_are_those_of_the_package(installed_python: Path) -> None:
    package = package_folder(installed_python)
    files = {path.relative_to(package) for path in package.rglob("*")}
    folders = {path.parts[0] for path in files if len(path.parts) > 1}
    assert folders - {"__pycache__"} == {"include", "lib"}
    assert [path.name for path in files if path.suffix == ".so"] == ["libmomentum_bn.so"]  # no trainer unasked
    assert {path.suffix for path in files if path.suffix} <= {".py", ".pyc", ".so", ".h", ".cmake", ".typed"}
