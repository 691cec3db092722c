"""Writes the files that fuzzing starts from, and those that once were too much for a reader: OUT/READER/NAME.

python tests/fuzz/make_seeds.py OUT
"""

import gzip
import io
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

RECIPE = Path(__file__).parents[2] / "apps/m2teacher/recipes/fashion_mnist.toml"
LARGEST = 2**32 - 1


def idx(*sizes: int, data: bytes = b"") -> bytes:
    return bytes([0, 0, 8, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes) + data


def idx_files() -> dict[str, bytes]:
    images = idx(2, 3, 4, data=bytes(range(24)))
    return {
        "labels": idx(5, data=bytes(range(5))),
        "images": images,
        "images.gz": gzip.compress(images, mtime=0),
        "cut": images[:-3],
        "cut.gz": gzip.compress(images, mtime=0)[:-9],
        "empty": b"",
        # Sizes of 0 beside others whose product no number holds.
        "none-of-many": idx(0, LARGEST, LARGEST, LARGEST),
        "more-than-there-is": idx(LARGEST, data=b"1"),
    }


def cifar10_files() -> dict[str, bytes]:
    record = bytes([3]) + bytes(3072)
    return {
        "two": record * 2,
        "cut": record[:-1],
        "label": bytes([10]) + record[1:],
        "empty": b"",
    }


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(mode: str) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (9, 11, len(mode)), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode)


def exif() -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = 6
    return data


def segment(jpeg: bytes, marker: int) -> tuple[int, int]:
    """Where the first segment of that kind begins, and where what follows its length ends."""
    start = jpeg.index(bytes([0xFF, marker]))
    return start, start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big")


def jpeg_files() -> dict[str, bytes]:
    colour = saved(pixels("RGB"), "JPEG")
    progressive = saved(pixels("RGB"), "JPEG", progressive=True)
    frame, after_frame = segment(colour, 0xC0)
    first_scan = segment(progressive, 0xDA)[0]
    second_scan = progressive.index(b"\xff\xda", first_scan + 2)
    return {
        "grey": saved(pixels("L"), "JPEG"),
        "colour": colour,
        "cmyk": saved(pixels("CMYK"), "JPEG"),
        "progressive": progressive,
        "exif": saved(pixels("RGB"), "JPEG", exif=exif()),
        "restarts": saved(pixels("RGB"), "JPEG", restart_marker_blocks=1),
        # Their error comes after the decoder has taken memory.
        "cut-in-header": colour[: frame + 8],
        "cut-after-header": colour[:after_frame],
        "cut": colour[: len(colour) // 2],
        "largest": colour[: frame + 5] + b"\xff\xff\xff\xff" + colour[frame + 9 :],
        "many-scans": progressive[:first_scan] + progressive[first_scan:second_scan] * 600 + progressive[second_scan:],
    }


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """Grey, 8 bits."""
    head = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def png_files() -> dict[str, bytes]:
    colour = saved(pixels("RGB"), "PNG")
    rows = chunk(b"IDAT", zlib.compress(bytes(12) * 9))
    return {
        "grey": png(11, 9, rows),
        "colour": colour,
        "alpha": saved(pixels("RGBA"), "PNG"),
        "palette": saved(pixels("L").convert("P"), "PNG"),
        "bits": saved(pixels("L").convert("1"), "PNG"),
        "wide": saved(Image.fromarray(np.arange(99, dtype=np.uint16).reshape(9, 11) * 600), "PNG"),
        "exif": png(11, 9, rows, chunk(b"eXIf", exif().tobytes()[6:])),
        "cut": colour[: len(colour) // 2],
        "cut-in-header": colour[:20],
        "large-and-empty": png(16384, 16384, chunk(b"IDAT", zlib.compress(bytes(99)))),
        "larger-than-allowed": png(2**31 - 1, 2**31 - 1, rows),
        "exif-of-a-gigabyte": png(11, 9, struct.pack(">I", 2**30) + b"eXIf", rows),
        "swollen-text": png(11, 9, chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10**7), 9)), rows),
    }


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, str) else json.dumps(header, separators=(",", ":"))
    text += " " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text.encode() + data


def checkpoint(config: str, trained_on: str | None = None) -> bytes:
    """With a checksum of zeros, in whose place the reader under test puts the right one."""
    images = {"images": 60000, "channels": 1, "height": 28, "width": 28, "pixel_mean": [0.3], "pixel_std": [0.3]}
    metadata = {"checksum": "xxh3-128:" + "0" * 32, "format": "m2teacher", "version": "2", "config": config}
    metadata["trained_on"] = json.dumps(images) if trained_on is None else trained_on
    names = ["metrics.rows", "metrics.loss_count", "metrics.loss_sum", "step"]
    tensors = {
        name: {"dtype": "F64" if name.endswith("sum") else "I64", "shape": [], "data_offsets": [8 * i, 8 * i + 8]}
        for i, name in enumerate(names)
    }
    return safetensors({"__metadata__": metadata} | tensors, bytes(8 * len(names)))


DEEP = "[" + ".".join("a" * 23000) + "]\nb = 1\n"


def safetensors_files() -> dict[str, bytes]:
    tensor = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    return {
        "none": safetensors({}),
        "one": safetensors({"a": tensor}, bytes(24)),
        "metadata": safetensors({"__metadata__": {"k": "v"}, "a": tensor}, bytes(24)),
        "checkpoint": checkpoint(RECIPE.read_text()),
        "cut": safetensors({"a": tensor}, bytes(23)),
        "none-of-many": safetensors({"a": {"dtype": "F32", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}}),
        "many-objects": safetensors('{"a":[' + ",".join(["{}"] * 20000) + "]}"),
        "deep": safetensors("[" * 20000),
        "deep-config": checkpoint(DEEP),
        "deep-images": checkpoint("", "[" * 20000),
    }


def toml_files() -> dict[str, bytes]:
    texts = {
        "recipe": RECIPE.read_text(),
        "values": '# text\nthreads = 2\n[pretrain]\ndata = "idx:/a b"\nwidths = [8, 16]\nsteps=0x10\nstrict = true\n',
        "section-of-another": "[knn]\nneighbours = 5\n",
        "lists": "[pretrain]\nwidths = [1,\n 2,\n 3]\n",
        "text-over-lines": '[pretrain]\ndata = """idx:\na"""\n',
        "deep-name": DEEP,
        "long": "[pretrain]\n" + "# \n" * 100000,
    }
    return {name: text.encode() for name, text in texts.items()}


READERS = {
    "idx": idx_files,
    "cifar10": cifar10_files,
    "jpeg": jpeg_files,
    "png": png_files,
    "safetensors": safetensors_files,
    "toml": toml_files,
}


def main(out: Path) -> None:
    for reader, files in READERS.items():
        folder = out / reader
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files().items():
            (folder / name).write_bytes(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
