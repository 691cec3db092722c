"""Folders that stand in for another torch: the files of the one that is here, but for those that tell them apart."""

from __future__ import annotations

import shutil
from pathlib import Path

# Parts of Caffe2Targets.cmake from torch's wheels of several versions.
TARGETS = Path(__file__).parent / "torch_targets"


def link_children(source: Path, folder: Path, *, but: str) -> None:
    """Makes `folder` with a link to everything in `source` but the one named."""
    folder.mkdir(parents=True)
    for child in source.iterdir():
        if child.name != but:
            (folder / child.name).symlink_to(child)


def dress_as_cuda_build(torch: Path, folder: Path) -> Path:
    """`folder` becomes `torch` with the CMake files of a CUDA build, on a machine that has no CUDA toolkit.

    Those builds have 1 where the CPU build has 0 or nothing and libraries beside torch_cpu, and cuda.cmake gives up
    where it finds no toolkit. Of a torch that is a CUDA build, cuda.cmake alone is replaced: there may be a toolkit.
    """
    link_children(torch, folder, but="share")
    shutil.copytree(torch / "share" / "cmake", folder / "share" / "cmake")
    caffe2 = folder / "share" / "cmake" / "Caffe2"
    config = (caffe2 / "Caffe2Config.cmake").read_text()
    if not (torch / "lib" / "libtorch_cuda.so").exists():
        asks = "if(0)\n  # The file public/cuda.cmake"
        insists = "if( AND NOT CAFFE2_USE_CUDA)"
        assert asks in config and insists in config, "torch's CMake files have changed"
        config = config.replace(asks, asks.replace("0", "1")).replace(insists, insists.replace("( ", "(1 "))
        (caffe2 / "Caffe2Config.cmake").write_text(config)
        targets = (caffe2 / "Caffe2Targets.cmake").read_text()
        cpu_target = "# Create imported target torch_cpu\n"
        assert targets.count(cpu_target) == 1, "torch's CMake files have changed"
        others = (TARGETS / "2.13-cuda.cmake").read_text().partition(cpu_target)[0]
        (caffe2 / "Caffe2Targets.cmake").write_text(targets.replace(cpu_target, others + cpu_target))
    (caffe2 / "public" / "cuda.cmake").write_text("set(CAFFE2_USE_CUDA OFF)\n")
    return folder


def dress_as_version(torch: Path, folder: Path, version: str) -> Path:
    """`folder` becomes `torch` with the headers of another version, which is where CMake reads it."""
    path = Path("include/torch/headeronly/version.h")
    for depth, name in enumerate(path.parts):
        link_children(torch.joinpath(*path.parts[:depth]), folder.joinpath(*path.parts[:depth]), but=name)
    parts = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    (folder / path).write_text("".join(f"#define TORCH_VERSION_{name} {number}\n" for name, number in parts))
    return folder
