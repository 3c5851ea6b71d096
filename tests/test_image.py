"""Pictures are read upright, as RGB, within limits; everything else is one clear error."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinyllava_edge.errors import ImageError
from tinyllava_edge.image import check_array, load_image, pad_to_square


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """A valid PNG header of any size with almost no data behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "LA"])
def test_modes_become_rgb(mode: str) -> None:
    picture = Image.new("RGB", (5, 3), (200, 30, 90)).convert(mode)
    array = load_image(encoded(picture))
    assert array.shape == (3, 5, 3) and array.dtype == np.uint8
    np.testing.assert_array_equal(array, np.asarray(picture.convert("RGB")))


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    picture = Image.fromarray(np.full((2, 2), 0x8000, dtype=np.uint16))
    assert load_image(encoded(picture))[0, 0].tolist() == [128, 128, 128]


def test_cmyk_jpeg_and_exif_rotation() -> None:
    assert load_image(encoded(Image.new("CMYK", (4, 4)), "JPEG")).shape == (4, 4, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert load_image(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).shape == (8, 4, 3)


def test_missing_text_truncated_and_empty(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        load_image(tmp_path / "none.png")
    text = tmp_path / "text.png"
    text.write_text("hello, I am not a picture")
    with pytest.raises(ImageError, match=r"text\.png: not a picture"):
        load_image(text)
    cut = tmp_path / "cut.png"
    cut.write_bytes(encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))[:2000])
    with pytest.raises(ImageError, match=r"cut\.png: truncated"):
        load_image(cut)
    empty = tmp_path / "empty.png"
    empty.touch()
    with pytest.raises(ImageError, match="empty file"):
        load_image(empty)
    with pytest.raises(ImageError):
        load_image(tmp_path)


@pytest.mark.parametrize("size", [(30_000, 30_000), (60_000, 10), (12_000, 12_000), (15_000, 2)])
def test_huge_is_refused_before_decoding(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="limit|pixels|thinner"):
        load_image(huge_png(*size))


def test_arrays() -> None:
    assert check_array(np.zeros((2, 2, 3), np.uint8)).shape == (2, 2, 3)
    for bad in (np.zeros((2, 2, 3), np.float32), np.zeros((2, 2), np.uint8), np.zeros((0, 2, 3), np.uint8)):
        with pytest.raises(ImageError):
            check_array(bad)


def test_pad_to_square_centres() -> None:
    padded = pad_to_square(np.full((2, 5, 3), 9, np.uint8), (1, 2, 3))
    assert padded.shape == (5, 5, 3)
    assert (padded[1:3] == 9).all() and padded[0, 0].tolist() == [1, 2, 3] and padded[4, 4].tolist() == [1, 2, 3]
