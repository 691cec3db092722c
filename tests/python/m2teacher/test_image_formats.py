"""Every kind of JPEG and PNG file is read as Pillow's exif_transpose and convert("RGB") give it."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from safetensors.numpy import load_file

from .conftest import Run, pretrain_arguments

HEIGHT, WIDTH = 32, 48
SIDE = 32
# Decoders of JPEG may round colours in other ways.
JPEG_TOLERANCE = 3

GENERATOR = np.random.default_rng(0)


def smooth(channels: int) -> np.ndarray:
    """An (H, W, C) image, uint8, that no turn or flip leaves alone and that JPEG hardly changes."""
    y, x = np.mgrid[0 : 1 : HEIGHT * 1j, 0 : 1 : WIDTH * 1j]
    planes = [x, y, x * y, 1 - x * y / 2]
    return np.stack([np.round(230 * plane + 10) for plane in planes[:channels]], 2).astype(np.uint8)


def noise(channels: int) -> np.ndarray:
    return GENERATOR.integers(0, 256, (HEIGHT, WIDTH, channels), dtype=np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    values: np.ndarray, bits: int, colour: int, between: bytes = b"", after: bytes = b"", interlace: int = 0
) -> bytes:
    """A PNG of (H, W, C) values of 8 or 16 bits, with chunks between its header and its pixels, and after these.

    colour is the format's number for it: 0 grey, 2 RGB.
    """
    passes = [(0, 0, 1, 1)]
    if interlace:  # Adam7
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    typed = values.astype(">u2" if bits == 16 else "u1")
    rows = b"".join(b"\0" + row.tobytes() for x, y, dx, dy in passes for row in typed[y::dy, x::dx])
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour, 0, 0, interlace)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + between + pixels + after + chunk(b"IEND", b"")


def without_segment(jpeg: bytes, marker: int) -> bytes:
    start = jpeg.index(bytes([0xFF, marker]))
    length = struct.unpack(">H", jpeg[start + 2 : start + 4])[0]
    return jpeg[:start] + jpeg[start + 2 + length :]


def big_endian_exif(orientation: int) -> bytes:
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"MM\0*" + struct.pack(">IH", 8, 1) + entry + struct.pack(">I", 0)


def jpeg_files() -> dict[str, bytes]:
    rgb = Image.fromarray(smooth(3))
    cmyk = saved(Image.fromarray(smooth(4), "CMYK"), "JPEG", quality=95)
    files = {f"orientation {n}": saved(rgb, "JPEG", quality=95, exif=oriented(n)) for n in range(10)}
    files["big-endian EXIF"] = saved(rgb, "JPEG", quality=95, exif=b"Exif\0\0" + big_endian_exif(8))
    files["EXIF cut short"] = saved(rgb, "JPEG", quality=95, exif=b"Exif\0\0" + big_endian_exif(6)[:12])
    files["grey"] = saved(Image.fromarray(smooth(1)[:, :, 0]), "JPEG", quality=95)
    files["progressive"] = saved(rgb, "JPEG", quality=95, progressive=True)
    files["CMYK"] = cmyk
    files["CMYK without Adobe's marker"] = without_segment(cmyk, 0xEE)
    return files


def png_files() -> dict[str, bytes]:
    rgb = noise(3)
    palette = Image.fromarray(rgb).quantize(4)
    exif = chunk(b"eXIf", big_endian_exif(6))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    return {
        "RGB": png(rgb, 8, 2),
        "interlaced": png(rgb, 8, 2, interlace=1),
        "16 bits": png(GENERATOR.integers(0, 65536, (HEIGHT, WIDTH, 3)), 16, 2),
        "transparent colour": png(rgb, 8, 2, between=chunk(b"tRNS", struct.pack(">HHH", *map(int, rgb[5, 5])))),
        "gamma": png(rgb, 8, 2, between=chunk(b"gAMA", struct.pack(">I", 100_000))),
        "gamma of grey": png(rgb[:, :, :1], 8, 0, between=chunk(b"gAMA", struct.pack(">I", 22_000))),
        "profile": saved(Image.fromarray(rgb), "PNG", icc_profile=profile),
        "EXIF": png(rgb, 8, 2, between=exif),
        "EXIF after the pixels": png(rgb, 8, 2, after=exif),
        "grey": png(rgb[:, :, :1], 8, 0),
        "1 bit": saved(Image.fromarray(rgb[:, :, 0]).convert("1"), "PNG"),
        "palette of 2 bits": saved(palette, "PNG", bits=2),
        "palette with transparency": saved(palette, "PNG", transparency=bytes([0, 100, 255])),
        "alpha": saved(Image.fromarray(noise(4), "RGBA"), "PNG"),
        "grey with alpha": saved(Image.fromarray(noise(2), "LA"), "PNG"),
    }


def as_pillow_reads(content: bytes) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE))).transpose(2, 0, 1)


def read_by_the_trainer(m2teacher: Run, folder: Path, files: dict[str, bytes], ending: str) -> dict[str, np.ndarray]:
    """What evaluation sees of each file: the square in its middle, not scaled. (3, SIDE, SIDE), uint8."""
    for name, content in files.items():  # each a class of its own, so that none is left out
        (folder / "images" / name).mkdir(parents=True)
        (folder / "images" / name / f"image.{ending}").write_bytes(content)
    options = {"image_size": SIDE, "centre_crop": 1, "steps": 1, "warmup_steps": 0, "batch_size": 2}
    result = m2teacher(*pretrain_arguments(f"folder:{folder / 'images'}", folder / "run", **options), "--strict")
    assert result.returncode == 0, result.stderr
    out = folder / "images.safetensors"
    result = m2teacher(
        *("neighbours", "--checkpoint", folder / "run", "--out", out),
        *("--queries", len(files), "--neighbours", 1),
    )
    assert result.returncode == 0, result.stderr
    found = load_file(out)
    assert found["labels"][:, 0].tolist() == list(range(len(files)))
    return dict(zip(sorted(files), found["images"][:, 0], strict=True))


@pytest.mark.parametrize(("ending", "tolerance"), [("jpg", JPEG_TOLERANCE), ("png", 0)])
def test_is_read_as_pillow_reads_it(m2teacher: Run, tmp_path: Path, ending: str, tolerance: int) -> None:
    files = jpeg_files() if ending == "jpg" else png_files()
    read = read_by_the_trainer(m2teacher, tmp_path, files, ending)
    worst = {
        name: int(np.abs(read[name].astype(int) - as_pillow_reads(content)).max()) for name, content in files.items()
    }
    assert {name: error for name, error in worst.items() if error > tolerance} == {}


def test_grey_of_16_bits_keeps_its_higher_byte(m2teacher: Run, tmp_path: Path) -> None:
    """Pillow clips such values at 255, which leaves a white image."""
    values = GENERATOR.integers(0, 65536, (HEIGHT, WIDTH, 1))
    files = {"grey": png(values, 16, 0), "RGB": png(noise(3), 8, 2)}
    read = read_by_the_trainer(m2teacher, tmp_path, files, "png")["grey"]
    left = (WIDTH - SIDE) // 2
    expected = values[:, left : left + SIDE, 0] >> 8
    assert (read == expected).all()
