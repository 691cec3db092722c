"""No memory is leaked: short runs of the trainer as it is, under LeakSanitizer."""

import io
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .conftest import checkpoint_of, pretrain_arguments

pytestmark = pytest.mark.sweep("leaks of the trainer, under LeakSanitizer")

LEAKED = 23


@pytest.fixture(scope="session")
def leak_sanitizer() -> dict[str, str]:
    """An environment in which a program is run under LeakSanitizer."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    name = "liblsan.so"
    library = (
        compiler
        and subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    if not library or library == name:
        pytest.skip("the compiler has no liblsan.so")
    # With the words about threads one sees that it was at work.
    return os.environ | {"LD_PRELOAD": library, "LSAN_OPTIONS": f"exitcode={LEAKED}:log_threads=1"}


def test_no_leaks(binary: Path, data: Path, tmp_path: Path, leak_sanitizer: dict[str, str]) -> None:
    run = tmp_path / "run"

    def call(*arguments: object) -> None:
        command = [str(binary), *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=leak_sanitizer, check=False)
        assert result.returncode == 0, result.stderr
        assert "Processing thread" in result.stderr

    call(*pretrain_arguments(data, run, checkpoint_every=4, threads=2))
    checkpoint_of(run).unlink()
    call("pretrain", "--resume", run)
    call("linear", "--checkpoint", run, "--labels-per-class", "0,5")
    call("export", "--checkpoint", run, "--out", tmp_path / "encoder.safetensors")


def broken_images() -> list[bytes]:
    """JPEG and PNG files that end, or go wrong, at many places of their headers and their pixels."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x010E] = "x" * 500
    broken = []
    for kind, options in {"JPEG": {"exif": exif}, "PNG": {}}.items():
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        whole = stream.getvalue()
        cuts = np.linspace(4, 0.9 * len(whole), 12).astype(int)
        broken += [whole[:cut] for cut in cuts]
        broken += [whole[:cut] + bytes([whole[cut] ^ 0xFF] * 8) + whole[cut + 8 :] for cut in cuts]
    return broken


def test_broken_images_leak_nothing(binary: Path, tmp_path: Path, leak_sanitizer: dict[str, str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i, content in enumerate(broken_images()):
        (images / f"{i:02}.png").write_bytes(content)
    for i in range(4):
        Image.new("RGB", (40, 40), (50 * i, 0, 0)).save(images / f"whole{i}.png")
    arguments = pretrain_arguments(f"folder:{images}", tmp_path / "run", steps=10, image_size=32, batch_size=4)
    result = subprocess.run(
        [str(binary), *arguments], capture_output=True, text=True, timeout=120, env=leak_sanitizer, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("unreadable image") > 25


def test_the_sanitizer_finds_a_leak(tmp_path: Path, leak_sanitizer: dict[str, str]) -> None:
    source = tmp_path / "leak.c"
    source.write_text("#include <stdlib.h>\nvoid *volatile p;\nint main(void) { p = malloc(99); p = 0; return 0; }\n")
    program = tmp_path / "leak"
    subprocess.run(["cc", "-O0", str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, env=leak_sanitizer, check=False)
    assert result.returncode == LEAKED
    assert "99 byte(s) leaked" in result.stderr
