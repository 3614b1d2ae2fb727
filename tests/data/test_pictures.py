"""Broken and unusual pictures are found before a run starts, and named with the row that shows them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from fedmllm.core.errors import DataError
from fedmllm.core.images import open_image
from fedmllm.core.types import Example, Shard
from fedmllm.data.pictures import check_rows, check_shards, look_at

QUARTER_TURN = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # orientation 6
IMAGE, TEXT = frozenset({"image"}), frozenset({"text"})


def saved(path: Path, mode: str = "RGB", **options) -> Path:
    Image.new(mode, (20, 10), 200 if mode in ("L", "I", "I;16", "P") else None).save(path, **options)
    return path


def truncated(path: Path, form: str) -> Path:
    whole = io.BytesIO()
    Image.effect_noise((60, 60), 50).convert("RGB").save(whole, form)
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    return path


def bomb(path: Path) -> Path:
    """A PNG of 400 million pixels in a few hundred bytes: only its header is honest."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


def empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def text(path: Path) -> Path:
    path.write_text("<html>404</html>")
    return path


BROKEN = {
    "missing": (lambda folder: folder / "nowhere.png", "is not there"),
    "zero-byte": (lambda folder: empty(folder / "a.png"), r"is empty \(0 bytes\)"),
    "truncated png": (lambda folder: truncated(folder / "a.png", "PNG"), "cannot be read"),
    "truncated jpeg": (lambda folder: truncated(folder / "a.jpg", "JPEG"), "cannot be read"),
    "no picture": (lambda folder: text(folder / "a.jpg"), "cannot be read"),
    "decompression bomb": (lambda folder: bomb(folder / "a.png"), "decompression bomb"),
    "a folder": (lambda folder: folder, "is not there"),
}
UNUSUAL = {
    "16-bit": lambda folder: saved(folder / "a.png", "I;16"),
    "CMYK": lambda folder: saved(folder / "a.jpg", "CMYK"),
    "palette": lambda folder: saved(folder / "a.png", "P"),
    "grey": lambda folder: saved(folder / "a.jpg", "L"),
    "transparent": lambda folder: saved(folder / "a.png", "RGBA"),
    "webp": lambda folder: saved(folder / "a.webp"),
    "bmp": lambda folder: saved(folder / "a.bmp"),
    "gif": lambda folder: saved(folder / "a.gif", "P"),
    "png in a jpg's name": lambda folder: saved(folder / "a.jpg", format="PNG"),
    "rotated": lambda folder: saved(
        folder / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    ),
}


def rows(*paths: Path) -> list[Example]:
    return [Example(i, {"image": (p,), "text": "x"}, "?", (), "a", f"rows.jsonl:{i + 1}") for i, p in enumerate(paths)]


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_picture_fails_with_file_line_and_id_or_its_row_is_skipped(tmp_path: Path, fault: str) -> None:
    make, message = BROKEN[fault]
    (tmp_path / "good").mkdir()
    examples = rows(saved(tmp_path / "good" / "good.png"), make(tmp_path))
    with pytest.raises(DataError, match=rf"^rows\.jsonl:2: row 1: image .*{message}"):
        check_rows(examples, IMAGE, "fail")
    kept, skipped, _ = check_rows(examples, IMAGE, "skip")
    assert [e.id for e in kept] == [0]
    assert len(skipped) == 1
    assert "rows.jsonl:2: row 1" in skipped[0]


@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_picture_is_fine(tmp_path: Path, kind: str) -> None:
    path = UNUSUAL[kind](tmp_path)
    look_at(path, "x")
    image = open_image(path, "x")
    assert image.mode == "RGB"
    assert image.size == ((10, 20) if kind == "rotated" else (20, 10))


def test_skipping_leaves_the_partition_as_it_was_drawn_and_hidden_pictures_alone(tmp_path: Path) -> None:
    good, gone = saved(tmp_path / "good.png"), tmp_path / "gone.png"
    examples = rows(gone, good, gone)
    shards = (Shard(0, (2, 1), (IMAGE, IMAGE | TEXT)), Shard(1, (0,), (TEXT,)))
    kept, skipped, _ = check_shards(examples, shards, "skip")
    assert kept == (Shard(0, (1,), (IMAGE | TEXT,)), Shard(1, (0,), (TEXT,)))
    assert len(skipped) == 1
    with pytest.raises(DataError, match=r"rows\.jsonl:3: row 2"):
        check_shards(examples, shards, "fail")


def test_each_file_is_looked_at_once(tmp_path: Path, monkeypatch) -> None:
    looked = []
    monkeypatch.setattr("fedmllm.data.pictures.look_at", lambda path, where: looked.append(path))
    path = tmp_path / "a.png"
    check_rows(rows(path, path, path), IMAGE, "fail")
    assert looked == [path]
