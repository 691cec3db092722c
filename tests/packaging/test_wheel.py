"""The wheel that `make wheel` left in dist/: what is in it, and its use where nothing can be compiled."""

from __future__ import annotations

import re
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from installation import CONSUMER, SOURCE, build_consumer, package_folder, run

MINORS = ["2.11", "2.12", "2.13", "2.14"]
MINOR = ".".join(torch.__version__.split(".")[:2])
WHEELS = list((SOURCE / "dist").glob("momentum_bn-*-py3-none-manylinux_*_x86_64.whl"))

pytestmark = [
    pytest.mark.sweep("the wheel for several torches"),
    pytest.mark.skipif(len(WHEELS) != 1, reason=f"{len(WHEELS)} wheels in {SOURCE / 'dist'}: `make wheel` makes one"),
]

USE = """
import tempfile
import momentum_bn, torch
import torch.distributed as dist
from torch.nn import Conv2d, Flatten, Sequential

def rank(index, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=2)
    layer = momentum_bn.MomentumBatchNorm2d(3, process_group=dist.group.WORLD, dtype=torch.float64)
    torch.manual_seed(0)
    both = torch.rand(4, 3, 5, 5, dtype=torch.float64)
    alone = momentum_bn.MomentumBatchNorm2d(3, dtype=torch.float64)
    torch.testing.assert_close(layer(both[2 * index : 2 * index + 2]), alone(both)[2 * index : 2 * index + 2])
    dist.destroy_process_group()

if __name__ == "__main__":
    print(momentum_bn.show_config())
    student = Sequential(Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), Flatten())
    teacher = momentum_bn.MomentumTeacher(student, total_iters=10)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    teacher.update()
    view1, view2 = torch.rand(2, 4, 3, 8, 8)
    (2 - torch.cosine_similarity(student(view1), teacher(view2)).mean()).backward()
    optimizer.step()

    layer, x = momentum_bn.MomentumBatchNorm2d(3), torch.rand(2, 3, 4, 4)
    # The default backend calls a C++ compiler.
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = momentum_bn.MomentumBatchNorm2d(3)(x)
    torch.testing.assert_close(compiled(x), expected)

    with tempfile.NamedTemporaryFile() as store:
        torch.multiprocessing.spawn(rank, (store.name + ".store",), nprocs=2)
    print("done")
"""


@pytest.fixture(scope="module")
def wheel_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that had torch, into which the wheel alone was installed."""
    environment = tmp_path_factory.mktemp("wheel") / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    visible = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    visible.update(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
    (site_packages / "more_packages.pth").write_text("\n".join(sorted(visible)) + "\n")
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"),
        *("--ignore-installed", WHEELS[0]),  # the package of this environment is visible and has the same version
    )
    return python


def test_files_and_their_size() -> None:
    assert WHEELS[0].stat().st_size < 100_000_000
    with zipfile.ZipFile(WHEELS[0]) as wheel:
        names = wheel.namelist()
        assert [info.date_time for info in wheel.infolist()] == [wheel.infolist()[0].date_time] * len(names)
    libraries = [name for name in names if name.endswith("/libmomentum_bn.so")]
    assert libraries == [f"momentum_bn/lib/torch-{minor}/libmomentum_bn.so" for minor in MINORS]
    assert not [name for name in names if re.search(r"lib(torch|c10|cuda|gomp)", Path(name).name)]
    copied = {Path(name).name.partition("-")[0] for name in names if name.startswith("momentum_bn.libs/lib")}
    assert copied == {"libjpeg", "libpng16"}
    dist_info = next(name for name in names if name.endswith(".dist-info/METADATA")).removesuffix("METADATA")
    licences = ("LICENSE", "libcli11-dev.txt", "libjpeg62-turbo.txt", "libpng16-16.txt", "nlohmann-json3-dev.txt")
    sboms = ("linked-in.cdx.json", "auditwheel.cdx.json")
    for name in (*(f"licenses/{name}" for name in licences), *(f"sboms/{name}" for name in sboms)):
        assert dist_info + name in names


def test_pip_installs_a_torch_that_there_is_a_library_for(wheel_python: Path, tmp_path: Path) -> None:
    code = "import importlib.metadata as m; print([r for r in m.requires('momentum-bn') if 'extra' not in r])"
    assert run(wheel_python, "-c", code, cwd=tmp_path) == "['torch<2.15,>=2.11']\n"


def test_no_name_of_a_folder_of_the_build() -> None:
    with zipfile.ZipFile(WHEELS[0]) as wheel:
        for name in wheel.namelist():
            assert str(SOURCE).encode() not in wheel.read(name), name


def undefined(library: Path) -> set[str]:
    """Names without version that a library takes from others; weak ones, which need not be there, are left out."""
    lines = run("nm", "--dynamic", "--undefined-only", "--without-symbol-versions", library).splitlines()
    return {line.split()[1] for line in lines if line.split()[0] == "U"}


def defined(library: Path) -> set[str]:
    lines = run("nm", "--dynamic", "--defined-only", "--without-symbol-versions", library).splitlines()
    return {line.split()[-1] for line in lines}


@pytest.mark.parametrize("minor", MINORS)
def test_every_symbol_is_in_that_torch(wheel_python: Path, minor: str) -> None:
    torch_libraries = SOURCE / "build-wheel" / f"torch-{minor}" / "torch" / "lib"
    if not torch_libraries.is_dir():
        pytest.skip(f"{torch_libraries} is not there: `make wheel` leaves it")
    library = package_folder(wheel_python) / "lib" / f"torch-{minor}" / "libmomentum_bn.so"
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "--dynamic", library))
    assert {name for name in needed if name.startswith(("libtorch", "libc10", "libcu"))} == {
        *("libtorch.so", "libtorch_cpu.so", "libc10.so"),
    }
    of_the_system = [Path(run("c++", f"-print-file-name={name}").strip()) for name in needed]
    files = [torch_libraries / name for name in needed if (torch_libraries / name).is_file()]
    files += [path for path in of_the_system if path.is_absolute()]
    assert undefined(library) - set().union(*map(defined, files)) == set()


def test_use_where_nothing_can_be_compiled(wheel_python: Path, tmp_path: Path) -> None:
    (tmp_path / "use.py").write_text(USE)
    said = run(wheel_python, "use.py", cwd=tmp_path, PATH=str(wheel_python.parent))
    assert f"built with torch {MINOR}." in said
    assert "CUDA kernels: built for compute capability 75 80 86 89 90 100 120, PTX of 120" in said
    assert said.endswith("done\n")


def test_trainer(wheel_python: Path, tmp_path: Path) -> None:
    """It trains on images of both kinds: the libraries that read them are inside."""
    images, out = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    pixels = torch.randint(0, 256, (16, 16, 16, 3), dtype=torch.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(images / f"{index}.{('png', 'jpg')[index % 2]}")
    small = ("--architecture", "small", "--widths", "8,16", "--batch-size", "8", "--steps", "2", "--warmup-steps", "1")
    run(
        *(wheel_python.with_name("m2teacher"), "pretrain", "--data", f"folder:{images}", "--out", out),
        *(*small, "--image-size", "16", "--projector-hidden", "16", "--predictor-hidden", "16", "--strict"),
        PATH=str(wheel_python.parent),
    )
    assert (out / "checkpoint-00000002.safetensors").is_file()


def test_consumer(wheel_python: Path, tmp_path: Path) -> None:
    """The torch that Python imports is found, and its library is linked."""
    prefix = run(wheel_python, "-c", "import momentum_bn; print(momentum_bn.cmake_prefix_path)", cwd=tmp_path).strip()
    program = build_consumer(
        tmp_path / "build", CONSUMER / "main.cpp", CMAKE_PREFIX_PATH=prefix, Python_EXECUTABLE=wheel_python
    )
    assert f"built with torch {MINOR}." in run(program)
    assert f"lib/torch-{MINOR}]" in run("readelf", "--dynamic", program) or f"lib/torch-{MINOR}:" in run(
        "readelf", "--dynamic", program
    )
